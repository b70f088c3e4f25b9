"""What must be right before anything is started, each with its own three lines; no server is needed."""

import contextlib
import os
import socket

import pytest
from flwr.proto.control_pb2 import ListNodesRequest

from client.deployment.hospital_folder import HospitalFolder
from client.deployment.supernode import supernode_command, supernode_environment
from client.deployment.supervisor import start
from client.provisioning.standing import leave
from common.errors import ConfigError, FederationError
from common.exit_codes import ExitCode
from common.flower_programs import free_port
from common.node_keys import make_key
from tests.client.certificates import Authority
from tests.client.deployment.running_hospital import Federation, RunningHospital, wait_for
from tests.deployment.small_disks import small_disk


@pytest.fixture
def hospital(tmp_path):
    return RunningHospital(tmp_path / "north", Authority(), free_port())


def test_a_key_that_others_can_read_is_refused(hospital):
    hospital.key.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others") as refused:
        start(hospital.folder)
    assert refused.value.fix == f"chmod 600 {hospital.key}"


def test_another_key_than_the_enrolled_one_is_refused(hospital):
    hospital.key.unlink()
    make_key(hospital.key, hospital.public, comment="new")
    with pytest.raises(ConfigError, match="not the one that is enrolled"):
        start(hospital.folder)


def test_a_missing_enrolment_says_who_makes_it(hospital):
    (hospital.folder / "enrolment.toml").unlink()
    with pytest.raises(ConfigError, match=r"enrolment\.toml") as refused:
        start(hospital.folder)
    assert "flower-server enroll" in refused.value.why


def test_another_name_or_count_than_on_the_roster_is_refused(hospital):
    hospital.toml.write_text(hospital.toml.read_text().replace("= 30", "= 31", 1))
    with pytest.raises(ConfigError, match="with 31 patients"):
        start(hospital.folder)


@pytest.mark.parametrize("which", ["runtime", "health"])
def test_a_taken_port_is_named(hospital, which):
    port = hospital.runtime_port if which == "runtime" else hospital.health_port
    named = pytest.raises(FederationError, match=f"port {port} on 127.0.0.1")
    with socket.create_server(("127.0.0.1", port)), named:
        start(hospital.folder)
    assert hospital.processes() == {}


def test_a_hospital_that_has_left_does_not_start(hospital):
    leave(hospital.state)
    with pytest.raises(FederationError, match="has left test"):
        start(hospital.folder)


def test_before_the_server_is_there_it_waits_and_ends_on_request(hospital):
    hospital.start()
    try:
        wait_for(lambda: hospital.status().get("last_error"), within_s=20)
        assert not hospital.status()["connected"]
    finally:
        assert hospital.end() == ExitCode.COMPLETED
    assert hospital.processes() == {}


def test_the_supernode_is_told_nothing_unsafe(hospital):
    folder = HospitalFolder(hospital.folder)
    command = supernode_command(folder, folder.enrolment())
    assert "--insecure" not in command
    assert command[command.index("--isolation") + 1] == "process"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    for option in ("--root-certificates", "--auth-supernode-private-key", "--superexec-auth-secret-file"):
        assert os.path.isabs(command[command.index(option) + 1])


def test_the_configured_proxy_wins_and_never_takes_loopback(hospital):
    text = hospital.toml.read_text()
    hospital.toml.write_text(text + 'https-proxy = "http://proxy.example:3128"\n')
    shell = {"HTTPS_PROXY": "http://other:1", "NO_PROXY": "*", "PATH": "/bin"}
    environment = supernode_environment(HospitalFolder(hospital.folder), shell)
    assert environment["HTTPS_PROXY"] == environment["https_proxy"] == "http://proxy.example:3128"
    assert set(environment["NO_PROXY"].split(",")) == {"127.0.0.1", "localhost", "::1"}


def test_a_proxy_that_is_none_is_refused(hospital):
    hospital.toml.write_text(hospital.toml.read_text() + 'https-proxy = "proxy.example"\n')
    with pytest.raises(ConfigError, match="https-proxy"):
        start(hospital.folder)


def test_a_taken_runtime_port_may_be_free_again_later(hospital):
    """Exit code 1: a service manager tries again; 2 means a setting, which only a person can change."""
    taken = socket.create_server(("127.0.0.1", hospital.runtime_port))
    with taken, pytest.raises(FederationError) as refused:
        start(hospital.folder)
    assert not isinstance(refused.value, ConfigError)


def test_a_full_disk_is_named_with_what_to_do(hospital):
    hospital.state.mkdir(exist_ok=True)
    with small_disk(hospital.state, megabytes=1) as disk:
        disk.fill()
        with pytest.raises(FederationError, match="cannot be written") as refused:
            start(hospital.folder)
        assert str(hospital.state) in refused.value.what
        assert "No space" in refused.value.why
        assert "free space" in refused.value.fix


def test_an_unknown_hospital_is_told_before_anything_heavy_is_loaded(tmp_path):
    with Federation(tmp_path / "server", Authority()) as server:
        hospital = RunningHospital(tmp_path / "north", server.authority, server.port)
        wait_for(lambda: hospital.ask_server().is_enrolled is False and answers(server), within_s=30)
        hospital.start()
        assert hospital.wait() == 1
    assert "enrol" in hospital.said()
    assert not (hospital.folder / "logs" / "worker.log").exists()


def answers(server):
    with contextlib.closing(server.control()) as control:
        return control.ListNodes(ListNodesRequest()) is not None
