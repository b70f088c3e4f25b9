"""Making a hospital: secrets stay secret, nothing is written over, everything reads back."""

import shutil
import stat
import subprocess

import pytest

from client.provisioning.code_list import accepted
from client.provisioning.new_hospital import make_hospital, renew_key
from common.bundle.bundle import bundle_sha256
from common.errors import ConfigError
from common.hospital_config import DataConfig, HospitalConfig, HospitalSection
from common.node_keys import load_private_key, load_public_key, public_key_of
from common.settings import load


def config(**more):
    return HospitalConfig(
        hospital=HospitalSection(name="north", enrolled_patients=120),
        data=DataConfig(path="/films", classes=("normal", "opacity")),
        **more,
    )


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_hospital_reads_back_and_keeps_its_secrets(tmp_path):
    made = make_hospital(tmp_path / "north", config())
    assert load(HospitalConfig, made.config_file) == config()
    key = tmp_path / "north/keys/hospital.key"
    assert (mode(key), mode(made.config_file), mode(tmp_path / "north")) == (0o600, 0o600, 0o700)
    assert public_key_of(load_private_key(key)).fingerprint == made.fingerprint
    assert load_public_key(made.public_key).fingerprint == made.fingerprint
    assert load_public_key(made.public_key).openssh.endswith(" north")
    assert made.enroll_command() == "flower-server enroll north hospital.key.pub --patients 120"


def test_it_accepts_the_installed_release_and_nothing_else(tmp_path):
    make_hospital(tmp_path / "north", config())
    (code,) = accepted(tmp_path / "north/state")
    assert code.sha256 == bundle_sha256()
    assert "wire schema" in code.note


def test_every_setting_has_a_comment_above_it(tmp_path):
    lines = make_hospital(tmp_path / "north", config()).config_file.read_text().splitlines()
    settings = [i for i, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(settings) > 30
    assert all(lines[i - 1].startswith("# ") for i in settings)
    assert "# Budget of the worst-off patient over everything ever trained here. Default: 8.0." in lines


def test_the_fingerprint_is_that_of_ssh_keygen(tmp_path):
    if not shutil.which("ssh-keygen"):
        pytest.skip("no ssh-keygen on this machine")
    made = make_hospital(tmp_path / "north", config())
    told = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(made.public_key)],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert made.fingerprint in told.stdout


def test_nothing_is_written_over(tmp_path):
    made = make_hospital(tmp_path / "north", config())
    before = made.config_file.read_bytes(), (tmp_path / "north/keys/hospital.key").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        make_hospital(tmp_path / "north", config())
    assert before == (made.config_file.read_bytes(), (tmp_path / "north/keys/hospital.key").read_bytes())


def test_a_key_of_an_interrupted_attempt_is_taken(tmp_path):
    first = make_hospital(tmp_path / "north", config())
    first.config_file.unlink()
    first.public_key.unlink()
    again = make_hospital(tmp_path / "north", config())
    assert again.fingerprint == first.fingerprint
    assert load_public_key(again.public_key).fingerprint == first.fingerprint


def test_a_renewed_key_keeps_every_older_one(tmp_path):
    folder = tmp_path / "north"
    prints = [make_hospital(folder, config()).fingerprint]
    for number in range(2):
        made, old = renew_key(folder)
        prints.append(made.fingerprint)
        assert public_key_of(load_private_key(old)).fingerprint == prints[number]
        assert load_public_key(old.with_name(old.name + ".pub")).fingerprint == prints[number]
        assert load_public_key(made.public_key).fingerprint == made.fingerprint
    assert len(set(prints)) == 3
    assert mode(folder / "keys/hospital.key") == 0o600
    assert made.enroll_command(replace_key=True).endswith("--patients 120 --replace-key")


def test_a_lost_key_is_replaced(tmp_path):
    made = make_hospital(tmp_path / "north", config())
    (tmp_path / "north/keys/hospital.key").unlink()
    again, old = renew_key(tmp_path / "north")
    assert old is None
    assert again.fingerprint != made.fingerprint
    assert load_public_key(again.public_key).fingerprint == again.fingerprint
