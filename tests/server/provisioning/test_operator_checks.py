"""`flower-server check`: each trouble an operator can have is one failed line that says what to do."""

import os
import socket
import subprocess
import sys
import time

import pytest

from common.checks import CheckState, exit_code
from common.health import HealthServer
from common.machine import PortState, free_memory_mb, port_state
from common.settings import to_toml
from server.provisioning.certificates import issue_server_certificate
from server.provisioning.checks import check_operator
from server.provisioning.enrolments import enrol_hospital
from tests.run_folders import build_run
from tests.server.provisioning.federations import hospital_key, public_key, small_federation

FAILED, WARNING, OK = CheckState.FAILED, CheckState.WARNING, CheckState.OK
HOLD_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    folder = small_federation(tmp_path / "op")
    for name in ("north", "south"):
        enrol_hospital(folder, name=name, key=public_key(tmp_path, name), enrolled_patients=400)
    return folder


def found(folder):
    return {check.name: check for check in check_operator(folder)}


def edit(folder, old, new):
    text = folder.federation_toml.read_text()
    assert old in text
    folder.federation_toml.write_text(text.replace(old, new))


def test_a_new_federation_with_its_hospitals_is_fine(folder):
    checks = check_operator(folder)
    # The clock of a test machine may be steered by nobody, its memory small: warnings, nothing more.
    assert exit_code(checks) == 0
    named = {check.name: check for check in checks}
    for name in ("settings", "versions", "server certificate", "authority", "secrets", "roster", "database"):
        assert named[name].state is OK
        assert not named[name].fix
    assert sum(name.startswith("port ") for name in named) == 3
    assert "begins one" in named["run"].result


@pytest.mark.parametrize(
    ("days", "state", "words"), [(20, WARNING, "20 days left"), (-0.9, FAILED, "expired 1 days ago")]
)
def test_a_certificate_that_ends_soon_or_has_ended(folder, days, state, words):
    issue_server_certificate(
        *(folder.server_key, folder.server_certificate),
        authority_key=folder.ca_key,
        authority=folder.ca_certificate,
        names=folder.config().network.certificate_names,
        days=days,
    )
    check = found(folder)["server certificate"]
    assert check.state is state
    assert words in check.result
    assert "flower-server renew" in check.fix


def test_a_new_address_that_the_certificate_does_not_hold(folder):
    edit(folder, "fl.example.org:8443", "other.example.org:8443")
    checks = found(folder)
    certificate = checks["server certificate"]
    assert certificate.state is FAILED
    assert "needs other.example.org, the certificate holds fl.example.org, localhost" in certificate.result
    assert "renew" in certificate.fix
    assert checks["roster"].state is WARNING
    assert "north, south" in checks["roster"].result


def test_mixed_up_keys_and_certificates(folder, tmp_path):
    other = small_federation(tmp_path / "other")
    kept = folder.server_key.read_bytes()
    folder.server_key.write_bytes(other.server_key.read_bytes())
    assert "is not its key" in found(folder)["server certificate"].result
    folder.server_key.write_bytes(kept)
    folder.ca_certificate.write_bytes(other.ca_certificate.read_bytes())
    checks = found(folder)
    assert "not issued by" in checks["server certificate"].result
    assert "is not the key of" in checks["authority"].result
    assert "restore" in checks["authority"].fix


def test_secrets_that_others_can_read_or_that_are_gone(folder):
    folder.superexec_secret.chmod(0o604)
    secrets = found(folder)["secrets"]
    assert secrets.state is FAILED
    assert secrets.fix == f"chmod 600 {folder.superexec_secret}"
    folder.superexec_secret.unlink()
    assert "there is no file" in found(folder)["secrets"].result


def test_settings_that_cannot_be_or_that_should_be_thought_over(folder):
    edit(folder, "quorum = 2", "quorum = 1")
    assert "single hospital" in found(folder)["settings"].result
    edit(folder, "private = true", "private = false")
    settings = found(folder)["settings"]
    assert settings.state is WARNING
    assert "WITHOUT privacy" in settings.result
    edit(folder, 'name = "cnn-small"', 'name = "gpt"')
    assert found(folder)["settings"].state is FAILED
    edit(folder, "quorum = 1", "qorum = 1")
    settings = found(folder)["settings"]
    assert settings.state is FAILED
    assert "quorum" in settings.fix
    folder.federation_toml.unlink()
    assert "is not the folder of a federation" in found(folder)["settings"].result


def test_too_few_hospitals(folder):
    edit(folder, "expected-hospitals = 0", "expected-hospitals = 3")
    roster = found(folder)["roster"]
    assert roster.state is FAILED
    assert "2 enrolled, 3 needed" in roster.result
    assert "enroll" in roster.fix
    folder.roster.write_text("{")
    assert found(folder)["roster"].state is FAILED


def test_ports_that_another_program_has_and_addresses_that_are_not_ours(folder):
    network = folder.config().network
    with socket.create_server(("127.0.0.1", network.superlink_port)):
        check = found(folder)[f"port {network.superlink_port}"]
        assert check.state is FAILED
        assert "taken" in check.result
        assert "superlink-port" in check.fix
    assert port_state("192.0.2.1", 8443) is PortState.NO_SUCH_ADDRESS
    assert port_state("127.0.0.1", network.superlink_port) is PortState.FREE


def test_ports_of_our_own_running_server_are_fine(folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(folder.lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert found(folder)["ports"].state is WARNING
        health = HealthServer(folder.config().network.health_port)
        health.start()
        try:
            health.set("", serving=True)
            assert found(folder)["ports"].state is OK
        finally:
            health.stop()
    finally:
        holder.communicate("", timeout=30)


def test_a_clock_behind_the_files(folder):
    ahead = time.time() + 3600
    os.utime(folder.roster, (ahead, ahead))
    clock = found(folder)["clock"]
    assert clock.state is FAILED
    assert "the clock is wrong" in clock.result
    assert "305 s" in clock.fix


def test_the_run_and_what_the_next_start_does_with_it(folder):
    run = build_run(folder.runs / "run-0001")
    (run / "config.toml").write_text(to_toml(folder.config()))
    folder.remember_run(run)
    done = found(folder)["run"]
    assert "completed after round 6 of 90" in done.result
    assert "--new" in done.fix
    (run / "result.json").unlink()
    check = found(folder)["run"]
    assert check.state is OK
    assert "the next start goes on with it" in check.result
    edit(folder, "learning-rate = 0.3", "learning-rate = 0.4")
    changed = found(folder)["run"]
    assert changed.state is FAILED
    assert "training.learning-rate" in changed.result
    edit(folder, "learning-rate = 0.4", "learning-rate = 0.3")
    (run / "result.json").write_text('{"status": "quorum-lost"}')
    assert "flower-server resume" in found(folder)["run"].fix
    (folder.runs / "fresh").mkdir()
    folder.remember_run(folder.runs / "fresh")
    assert "not begun" in found(folder)["run"].result
    folder.remember_run(folder.runs / "gone")
    assert "not the folder of a run" in found(folder)["run"].result


def test_a_broken_database(folder):
    folder.database.write_bytes(b"this is no database" * 100)
    database = found(folder)["database"]
    assert database.state is FAILED
    assert "damaged" in database.result


def test_memory_is_read_from_linux():
    assert 10 < free_memory_mb() < 10**8


def test_a_hospital_key_is_never_in_the_operators_folder(folder, tmp_path):
    hospital_key(tmp_path, "third")
    secrets = {p.read_bytes() for p in tmp_path.glob("*.key")}
    assert not secrets & {path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
