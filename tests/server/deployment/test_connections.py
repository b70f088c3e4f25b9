"""Connections that ask nothing, or never end, do not keep hospitals out; nor do they fill a log."""

import contextlib
import logging
import resource
import socket
import ssl
import subprocess
import time

import pytest

from common.flower_programs import free_port, python_module
from server.deployment import connections
from server.deployment.seldom import Seldom
from simulations.benchmarks.process_memory import pss_of
from tests.server.deployment import front_door
from tests.server.deployment.front_door import Door, Upstream, head

LARGEST_CONNECTION_BYTES = 400_000

door, people, tls = front_door.door, front_door.people, front_door.tls


def ended_within(connection, seconds):
    """Whether the other side closes; the seconds that it took."""
    connection.settimeout(seconds)
    began = time.monotonic()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while connection.recv(4096):
            pass
    return time.monotonic() - began


def test_a_connection_that_sends_no_whole_head_is_closed(door, monkeypatch):
    monkeypatch.setattr(connections, "FIRST_REQUEST_S", 0.6)
    with door.connect() as silent, door.connect() as dribbling:
        for byte in b"POST /v1":
            dribbling.send(bytes([byte]))
            time.sleep(0.05)
        assert 0.1 < ended_within(silent, 5) < 1.5
        assert ended_within(dribbling, 5) < 1.5
    assert door.post("get-run").status_code == 200


def test_an_idle_connection_and_one_that_dribbles_between_requests_are_closed(door, monkeypatch):
    monkeypatch.setattr(connections, "IDLE_S", 0.6)
    with door.connect() as connection:
        for _ in range(2):
            connection.sendall(head("get-run", 0, door.people["a"].headers()))
            assert b" 200 " in connection.recv(4096)
            time.sleep(0.3)
        connection.send(b"POST")
        assert ended_within(connection, 5) < 1.5


def test_a_request_that_does_not_end_is_ended(door, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_S", 0.6)
    with door.connect() as connection:
        connection.sendall(head("get-fab", 1000, door.people["a"].headers()) + b"x")
        assert ended_within(connection, 5) < 1.5
    while door.front._open:
        time.sleep(0.01)


def test_silent_connections_make_room_for_hospitals(tls, people, tmp_path):
    with Door(tls, people, tmp_path, Upstream(), max_requests=2) as door, contextlib.ExitStack() as stack:
        assert door.post("get-run").status_code == 200  # its connection is kept
        silent = [stack.enter_context(door.connect()) for _ in range(80)]
        for _ in range(10):
            with door.new_client() as client:
                answer = client.post("/v1/fleet/get-run", headers=people["a"].headers())
                assert answer.status_code == 200
        assert len(door.outer.server.server_state.connections) <= 55
        assert ended_within(silent[0], 2) < 1
        with pytest.raises(TimeoutError):
            ended_within(silent[-1], 0.3)
        assert door.post("get-run").status_code == 200


def test_a_handshake_that_does_not_come_is_not_waited_for(tls, people, tmp_path, monkeypatch):
    from server.deployment import front_process

    monkeypatch.setattr(front_process, "HANDSHAKE_S", 0.5)
    with (
        Door(tls, people, tmp_path, Upstream()) as door,
        socket.create_connection(("127.0.0.1", door.outer.port)) as plain,
    ):
        assert ended_within(plain, 5) < 1.5


@pytest.fixture
def process(tls, door, tmp_path):
    """The front in a process of its own, before `door`'s SuperLink; `door` leads to it."""
    port, log = free_port(), (tmp_path / "front.log").open("wb")
    (tmp_path / "state").mkdir()
    options = {"listen": f"127.0.0.1:{port}", "upstream": f"127.0.0.1:{door.inner.port}", "authority": tls[1]}
    options |= {"certificate": tls[3], "key": tls[2], "state": tmp_path / "state"}
    command = python_module("server.deployment.front_process")
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    process = subprocess.Popen(
        command, stderr=log, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    )
    try:
        door.client.close()
        door.outer.port = port
        give_up_at = time.monotonic() + 20
        while time.monotonic() < give_up_at:
            with contextlib.suppress(OSError), door.connect():
                break
            time.sleep(0.1)
        yield process
        process.terminate()
        process.wait(10)
        assert "Traceback" not in (tmp_path / "front.log").read_text()
    finally:
        process.kill()
        process.wait()
        log.close()


def test_the_process_serves_and_may_open_enough_files(people, door, process):
    with door.new_client() as client:
        for _ in range(30):
            assert client.get("/nowhere").status_code == 404
        with door.connect() as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            assert b" 400 " in connection.recv(4096)
        answer = client.post("/v1/fleet/get-run", headers=people["a"].headers())
        assert answer.status_code == 200
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[0] > 256


def test_open_connections_keep_little_memory(people, door, process):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(door.new_client()) for _ in range(41)]
        sizes = []
        for client in clients:
            answer = client.post("/v1/fleet/get-run", content=bytes(700_000), headers=people["a"].headers())
            assert answer.status_code == 200
            sizes.append(pss_of({process.pid: "front"})["front"])
    assert sizes[40] - sizes[0] < 40 * LARGEST_CONNECTION_BYTES


def test_a_line_is_logged_once_a_minute_with_a_count():
    now, lines = [0.0], []
    log = logging.Logger("front")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    handler.addFilter(Seldom(lambda: now[0]))
    log.addHandler(handler)
    for _ in range(50):
        log.warning("the SuperLink answered %s with %d", "/v1/fleet/get-run", 500)
        log.warning("fault\n<_SSLProtocol at 0x%x>", id(now))
    assert len(lines) == 2
    log.warning("the SuperLink answered %s with %d", "/v1/fleet/get-fab", 500)
    assert len(lines) == 3
    now[0] = 61.0
    log.warning("the SuperLink answered %s with %d", "/v1/fleet/get-run", 500)
    assert lines[3] == "the SuperLink answered /v1/fleet/get-run with 500 (49 more like this before)"
    for n in range(1000):
        log.warning("kind %s", "x" * (n % 190) + "y" * (n // 190))
    assert len(lines) < 260
