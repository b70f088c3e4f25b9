"""A server that points elsewhere: signature and updates of a hospital go to its own server only."""

import json
import time

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest

from client.deployment.fleet_client import GuardedFleetClient
from client.deployment.hospital_folder import HospitalFolder
from client.deployment.open_session import end_session
from client.deployment.supernode import supernode_command, supernode_environment
from common.child_process import ChildProcess
from tests.client.certificates import Authority
from tests.client.deployment.running_hospital import RunningHospital, wait_for
from tests.client.deployment.test_impostor import TalkingServer

HELD = "/v1/fleet/pull-messages?held=1"


def to(location, status=307):
    return status, b"", {"location": location}


@pytest.fixture
def authority():
    return Authority()


@pytest.fixture
def server(authority, tmp_path):
    with TalkingServer(certificate=authority.issue(tmp_path / "tls")) as running:
        yield running


@pytest.fixture
def client(authority, server):
    own = f"127.0.0.1:{server.port}"
    with GuardedFleetClient.from_server_address(own, False, authority.pem.encode(), []) as client:
        yield client


def pull(client):
    return client.PullMessages(PullMessagesRequest())


def test_the_fronts_own_redirect_is_followed(server, client):
    server.answer = lambda path: (200, b"", {}) if path == HELD else to(HELD)
    pull(client)
    assert [path for path, _ in server.asked] == ["/v1/fleet/pull-messages", HELD]


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS of the same authority"])
def test_another_place_is_not(server, client, authority, tmp_path, has_tls):
    certificate = authority.issue(tmp_path / "other") if has_tls else None
    with TalkingServer(certificate=certificate) as trap:
        server.answer = to(f"http{'s' * has_tls}://127.0.0.1:{trap.port}{HELD}")
        with pytest.raises(httpx.RemoteProtocolError):
            pull(client)
        assert (trap.connections, len(server.asked)) == (0, 1)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_another_path_or_method_of_the_server_is_not(server, client, status):
    server.answer = to("/v1/control/list-runs", status)
    with pytest.raises(httpx.RemoteProtocolError):
        pull(client)
    if status < 304:  # these make a GET of it
        server.answer = to(HELD, status)
        with pytest.raises(httpx.RemoteProtocolError):
            pull(client)
    assert {path for path, _ in server.asked} == {"/v1/fleet/pull-messages"}


def test_a_circle_counts_as_a_broken_connection(server, client):
    server.answer = to(HELD)
    with pytest.raises(httpx.TransportError):
        pull(client)


def test_its_words_are_none_that_are_final_to_flower(server, client):
    server.answer = to("https://tls.example/certificate")
    with pytest.raises(httpx.RemoteProtocolError) as refused:
        client.ActivateNode(ActivateNodeRequest())
    assert not any(word in str(refused.value).lower() for word in ("ssl", "tls", "certificate"))


def test_a_supernode_and_the_end_of_a_session_stay_with_their_server(server, authority, tmp_path):
    hospital = RunningHospital(tmp_path / "north", authority, server.port)
    folder = HospitalFolder(hospital.folder)
    enrolment = folder.enrolment()
    key = folder.key(enrolment)
    folder.prepare(enrolment, key)
    log = folder.logs / "supernode.log"
    with TalkingServer() as trap:
        server.answer = to(f"http://127.0.0.1:{trap.port}/v1/fleet/activate-node")
        end_session(enrolment, key, 7)
        assert server.asked[0][0] == "/v1/fleet/deactivate-node"
        environment = supernode_environment(folder, {"PATH": "/bin"})
        supernode = ChildProcess(supernode_command(folder, enrolment), log=log, env=environment)
        supernode.start()
        try:
            wait_for(lambda: len(server.asked) > 3, within_s=30, what=f"three tries {log.read_text()}")
            assert supernode.is_running
        finally:
            supernode.stop(3)
        time.sleep(0.2)
        assert trap.connections == 0, json.dumps([path for path, _ in trap.asked])
