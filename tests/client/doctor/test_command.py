"""`flower-client check`: severities, exit codes, `--strict`, `--list`, JSON; bounded memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.cli import app
from client.doctor.answer import progress
from client.provisioning.new_hospital import make_hospital
from common.checks import Check, CheckState, exit_code
from common.hospital_config import HospitalConfig
from common.settings import parse
from tests.client.doctor.films import film, save, sound, write_table


def call(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films").mkdir()
    return tmp_path / "films"


@pytest.fixture
def odd(folder):
    """Sound films and a negative: a warning, and nothing that fails."""
    save(folder / "odd.png", 255 - film(99))
    row = {"path": "odd.png", "label": "ill", "patient": "x", "split": "train"}
    return write_table(folder, [row, *sound(folder, 80)])


def test_warnings_fail_only_when_asked_to(folder, odd):
    assert call("--data", odd).exit_code == 0
    assert call("--data", odd, "--strict").exit_code == 1
    sound_films = write_table(folder, sound(folder, 80))
    assert call("--data", sound_films, "--strict").exit_code == 0


def test_the_exit_code_of_each_severity():
    for state, usual, strict in (
        (CheckState.OK, 0, 0),
        (CheckState.NOTE, 0, 0),
        (CheckState.WARNING, 0, 1),
        (CheckState.FAILED, 1, 1),
    ):
        checks = [Check(name="x", state=state, result="")]
        assert (exit_code(checks), exit_code(checks, strict=True)) == (usual, strict)


def test_severity_stands_in_the_table_and_the_files_in_json_only(odd):
    shown = call("--data", odd)
    assert "warning: 1 of 81 look like negatives" in shown.stdout
    assert "odd.png" not in shown.stdout
    content = json.loads(call("--data", odd, "--format", "json").stdout)
    assert content["usable"]
    [row] = [row for row in content["checks"] if row["check"] == "inverted"]
    assert row["severity"] == "warning"
    assert row["files"] == [["odd.png"]]
    assert {row["severity"] for row in content["checks"]} == {"ok", "warning"}


def test_the_files_of_one_finding_are_listed_line_by_line(folder, odd):
    listed = call("--data", odd, "--list", "Inverted")
    assert (listed.exit_code, listed.stdout) == (0, "odd.png\n")
    save(folder / "copy.bmp", film(3))
    rows = [*sound(folder, 60), {"path": "copy.bmp", "label": "ill", "patient": "x", "split": "train"}]
    table = write_table(folder, rows)
    assert call("--data", table, "--list", "repeated-across-patients").stdout == "3.png\tcopy.bmp\n"
    in_json = call("--data", table, "--list", "repeated pictures", "--format", "json")
    assert json.loads(in_json.stdout) == [["3.png", "copy.bmp"]]
    assert call("--data", table, "--list", "inverted").stdout == ""


def test_an_unknown_finding_is_an_error_that_names_those_with_files(odd):
    answer = call("--data", odd, "--list", "sideways")
    assert answer.exit_code != 0
    assert "name one of: inverted" in str(answer.exception)


def test_a_hospitals_own_folder_lists_too(tmp_path, odd):
    values = {
        "hospital": {"name": "north", "enrolled-patients": 80},
        "data": {"path": str(odd)},
        "site": {"ledger": str(tmp_path / "ledger")},
    }
    hospital = tmp_path / "north"
    make_hospital(hospital, parse(HospitalConfig, values, source="test"))
    listed = call(hospital, "--list", "inverted")
    assert (listed.exit_code, listed.stdout) == (0, "odd.png\n")
    assert call(hospital, "--list", "inverted", "--strict").exit_code == 1


def test_progress_is_said_once_for_each_step_where_nobody_watches(capsys):
    with progress() as watch:
        for done in range(1, 501):
            watch("decoding", done, 500)
        watch("comparing pictures", 0, 1)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.split("\n") == ["decoding: 500", "comparing pictures", ""]


_MEASURED = """
import re, sys
from client.cli import main
sys.argv = ["flower-client", "check", "--data", sys.argv[1], "--strict"]
try:
    main()
finally:
    # Not ru_maxrss, which remembers the process that started this one.
    print(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


@pytest.mark.faults
@pytest.mark.ci
def test_five_thousand_files_stay_within_two_hundred_megabytes(tmp_path):
    folder = tmp_path / "films"
    marks = np.random.default_rng(0)
    lines = ["path,label,patient"]
    folder.mkdir()
    for number in range(5000):
        plain = film(number % 40).astype(np.float32)
        coarse = Image.fromarray(marks.normal(0, 14, (17, 17)).astype(np.float32))
        picture = plain + np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC))
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / f"{number}.bmp")
        lines.append(f"{number}.bmp,{('ill', 'well')[number // 2 % 2]},p{number}")
    (folder / "films.csv").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, folder / "films.csv"], capture_output=True, text=True, check=True
    )
    assert "5000 of 5000 patients" in done.stdout
    kilobytes = int(done.stderr.split()[-1])

    assert kilobytes < 200_000
