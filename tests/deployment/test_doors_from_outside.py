"""What is open to another address than loopback: the Fleet calls over TLS, and nothing else."""

import contextlib
import socket
import ssl
from pathlib import Path

import httpx
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest

from simulations.engines.rehearsal import SERVER
from tests.deployment.federation import processes_of, until
from tests.deployment.operated import operated

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]
ELSEWHERE = "127.0.0.2"
"""A second address of this machine; whoever comes by it finds what listens on every address only."""
CLOSED = {
    404: ("control/start-run", "control/list-nodes", "control/register-node", "control/stop-run"),
    403: ("fleet/register-node", "fleet/unregister-node"),
}
RUNTIME = ("acquire-task", "pull-task-input", "push-messages", "push-task-output", "get-nodes")
ODD = ("/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "//v1/control/start-run")
ODD += ("/V1/CONTROL/start-run", "/v1/fleet/pull-messages/../../control/start-run", "/docs", "/health", "/")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A server that listens on every address, and no hospital."""
    with operated(tmp_path_factory.mktemp("doors") / "run", starts=False) as federation:
        federation.open_to(ELSEWHERE)
        federation.start(SERVER)
        until(lambda: "hospitals may connect" in federation.said(SERVER), what="the open path")
        yield federation


def client_of(opened, address, port):
    context = ssl.create_default_context(cafile=str(opened.operator.ca_certificate))
    return httpx.Client(base_url=f"https://{address}:{port}", verify=context, trust_env=False, timeout=10)


def raw_status(opened, path):
    """Status of a POST whose path no client library has tidied."""
    context = ssl.create_default_context(cafile=str(opened.operator.ca_certificate))
    with (
        socket.create_connection((ELSEWHERE, opened.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=ELSEWHERE) as secure,
    ):
        head = f"POST {path} HTTP/1.1\r\nHost: {ELSEWHERE}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        secure.sendall(head.encode())
        return int(secure.recv(64).split()[1])


def test_from_another_address_only_the_fleet_path_answers(opened):
    with client_of(opened, ELSEWHERE, opened.port) as client:
        for status, paths in CLOSED.items():
            for path in paths:
                assert client.post(f"/v1/{path}").status_code == status, path
        for call in RUNTIME:
            assert client.post(f"/v1/runtime/{call}").status_code == 404, call
        answer = client.post("/v1/fleet/get-run", headers={"content-type": "application/protobuf"})
        assert answer.status_code == 401, "a Fleet call without a hospital's signature"
        assert client.get("/v1/fleet/pull-messages").status_code == 404
    for path in ODD:
        assert raw_status(opened, path) in (403, 404), path


def test_flowers_own_port_is_not_open_there_and_gives_no_task_without_the_secret(opened):
    port = opened.rehearsal.ports[SERVER]["superlink"]
    for closed_port in (port, opened.rehearsal.ports[SERVER]["health"]):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((ELSEWHERE, closed_port), timeout=2)
    asked = AcquireTaskRequest(supported_task_types=["flwr-serverapp"]).SerializeToString()
    headers = {"content-type": "application/protobuf"}
    with client_of(opened, "127.0.0.1", port) as client:
        answer = client.post("/v1/runtime/acquire-task", content=asked, headers=headers)
        assert answer.status_code == 401


def test_plaintext_is_refused(opened):
    with socket.create_connection((ELSEWHERE, opened.port), timeout=10) as plain:
        plain.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"200" not in plain.recv(200)


def test_the_superlink_keeps_its_state_in_a_file(opened):
    """Flower's default is memory, which would forget every hospital's key at a restart."""
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in processes_of(opened.folder)]
    (words,) = [line for line in lines if b"--database" in line]
    assert words[words.index(b"--database") + 1] == str(opened.operator.database).encode()
    assert opened.operator.database.stat().st_size > 0
    assert b"--insecure" not in words
