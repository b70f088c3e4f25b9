"""The generated hospital.toml: each comment is whole lines of words, whatever the docstring's own breaks."""

from common.commented_toml import to_commented_toml
from common.hospital_config import HospitalConfig, HospitalSection


def test_a_long_docstring_is_wrapped_as_a_whole():
    config = HospitalConfig(
        hospital=HospitalSection(name="north", enrolled_patients=30), data={"path": "images.npz"}
    )
    lines = to_commented_toml(config, head="About this file.").splitlines()
    comments = [line for line in lines if line.startswith("# ")]
    assert all(len(line) <= 102 for line in comments)
    for before, after in zip(lines, lines[1:], strict=False):
        if before.startswith("# ") and after.startswith("# ") and "=" not in before + after:
            first = after.removeprefix("# ").split()[0]
            assert len(before) + 1 + len(first) > 102, (before, after)  # nothing more fitted on the line
