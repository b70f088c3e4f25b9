"""The front alone, before an upstream of ten lines."""

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest

from server.deployment import front as front_module
from server.deployment.front import FLEET, HEADER, OPEN_PATHS, PULL
from tests.server.deployment import front_door
from tests.server.deployment.front_door import ONE_MB, Door, Upstream, head, message

door, people, tls = front_door.door, front_door.people, front_door.tls

ONE, TWO = "1" * 64, "2" * 64


def test_ten_calls_pass_and_nothing_else(door):
    assert len(OPEN_PATHS) == 10
    for path in sorted(OPEN_PATHS - {PULL}):
        assert door.post(path.removeprefix(FLEET)).status_code == 200
    assert [path for _, path, _ in door.upstream.asked] == sorted(OPEN_PATHS - {PULL})
    closed = [
        *("/", "/docs", "/openapi.json", "/health", "/v1/fleet", "/v1/fleet/", "/v1/fleet/pull-messages/"),
        *("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task"),
        *(
            "/v1/fleet/%2e%2e/control/start-run",
            "//v1/fleet/get-run",
            "/v1/fleet/get-run%00",
            "/V1/fleet/get-run",
        ),
    ]
    for path in closed:
        assert door.client.post(path).status_code == 404, path
    for call in ("register-node", "unregister-node"):
        assert door.post(call).status_code == 403
    assert door.client.get("/v1/fleet/get-run").status_code == 404
    assert len(door.upstream.asked) == 9


def test_every_answer_says_which_release_this_is_and_what_time(door):
    for path in ("/", "/v1/fleet/register-node", "/v1/fleet/get-run"):
        answer = door.client.post(path)
        assert answer.headers[HEADER].startswith("0.")
        assert ";schema=3;bundle=" in answer.headers[HEADER]
        assert "date" in answer.headers
        assert "server" not in answer.headers


@pytest.mark.parametrize("status", [404, 413, 429, 500, 502, 504, 302])
def test_what_a_supernode_would_die_of_becomes_503(door, status):
    door.upstream.answers[FLEET + "get-run"] = (status, b"secret words")
    answer = door.post("get-run")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert b"secret" not in answer.content
    door.upstream.answers[PULL] = (status, b"")
    assert door.pull().status_code == 503


@pytest.mark.parametrize("status", [400, 401, 403, 412, 415])
def test_what_flower_means_is_passed_on(door, status):
    door.upstream.answers[FLEET + "activate-node"] = (status, b'{"code": 1}')
    answer = door.post("activate-node")
    assert (answer.status_code, answer.content) == (status, b'{"code": 1}')


def test_a_superlink_that_is_away_is_503_and_comes_back(tls, people, tmp_path):
    with Door(tls, people, tmp_path, Upstream()) as door:
        real = door.front._upstream
        gone = httpx.AsyncClient(base_url="https://127.0.0.1:9", verify=False, trust_env=False)
        door.front._upstream = gone
        assert door.post("get-run").status_code == 503
        assert door.pull().status_code == 503
        door.front._upstream = real
        asyncio.run(gone.aclose())
        assert door.post("get-run").status_code == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read(door):
    assert door.post("get-fab", b"x" * ONE_MB).status_code == 200
    assert door.post("get-fab", b"x" * (ONE_MB + 1)).status_code == 413
    started = time.monotonic()
    with door.connect() as connection:
        connection.sendall(head("push-object", 99999999999, door.people["a"].headers()))
        assert b" 413 " in connection.recv(4096)
    assert time.monotonic() - started < 2

    def stream():
        for _ in range(40):
            yield b"x" * (ONE_MB // 8)

    with contextlib.suppress(httpx.TransportError):  # it may hang up on somebody who does not stop
        assert door.post("get-fab", stream()).status_code == 413
    assert max(len(body) for _, _, body in door.upstream.asked) == ONE_MB


def test_more_requests_than_allowed_get_503_at_once(tls, people, tmp_path):
    with (
        Door(tls, people, tmp_path, Upstream(), max_requests=4, hold_s=1.5) as door,
        ThreadPoolExecutor(8) as pool,
    ):
        held = [pool.submit(door.pull, follow_redirects=False) for _ in range(4)]
        while door.front._open < 4:
            time.sleep(0.02)
        began = time.monotonic()
        assert door.post("send-node-heartbeat").status_code == 503
        assert time.monotonic() - began < 0.5
        assert [future.result().status_code for future in held] == [307] * 4
        assert door.post("send-node-heartbeat").status_code == 200


def test_plaintext_is_refused(door):
    with pytest.raises(httpx.TransportError):
        httpx.post(f"http://127.0.0.1:{door.outer.port}{PULL}", trust_env=False, timeout=3)
    assert door.upstream.asked == []


def test_a_pull_is_held_until_the_bell_and_then_answered_at_once(tls, people, tmp_path):
    with Door(tls, people, tmp_path, Upstream(), hold_s=20.0) as door, ThreadPoolExecutor(1) as pool:
        held = pool.submit(door.pull)
        while len(door.upstream.pulls()) < 1:
            time.sleep(0.01)
        time.sleep(0.3)
        assert not held.done()
        assert len(door.upstream.pulls()) == 1
        door.upstream.answers[PULL] = [(200, message(ONE))]
        rung = time.monotonic()
        door.bell.ring()
        answer = held.result(timeout=5)
        assert time.monotonic() - rung < 0.2
        assert PullMessagesResponse.FromString(answer.content).messages_list[0].metadata.message_id == ONE


def test_a_held_pull_is_asked_again_every_two_seconds_without_a_bell(tls, people, tmp_path):
    with Door(tls, people, tmp_path, Upstream(), hold_s=5.0) as door:
        door.upstream.answers[PULL] = [(200, b""), (200, b""), (200, message(ONE))]
        began = time.monotonic()
        assert door.pull().content
        assert 3.9 < time.monotonic() - began < 4.8
        assert len(door.upstream.pulls()) == 3


def test_holds_go_over_into_each_other_and_end_before_the_signature_ages(tls, people, tmp_path, monkeypatch):
    assert front_module._LONGEST_HOLDS * 25 + 25 < 305
    monkeypatch.setattr(front_module, "_LONGEST_HOLDS", 3)
    with Door(tls, people, tmp_path, Upstream(), hold_s=1.0) as door:
        answer = door.pull(timeout=30)
        assert (answer.status_code, answer.content) == (200, b"")
        assert len(answer.history) == 2
        assert all(step.status_code == 307 for step in answer.history)
        assert door.pull(follow_redirects=False).headers["location"] == PULL + "?held=1"


def test_a_signature_that_ages_in_a_hold_ends_the_hold_and_not_the_supernode(door):
    door.upstream.answers[PULL] = [(200, b""), (401, b"{}")]
    assert door.pull().status_code == 200
    door.upstream.answers[PULL] = (401, b"{}")
    assert door.pull().status_code == 401


def test_nobody_is_asked_for_a_caller_that_has_gone(tls, people, tmp_path):
    with Door(tls, people, tmp_path, Upstream(), hold_s=20.0) as door:
        with pytest.raises(httpx.ReadTimeout):
            door.pull(timeout=0.4)
        time.sleep(0.2)
        before = len(door.upstream.pulls())
        door.upstream.answers[PULL] = [(200, message(ONE))]
        door.bell.ring()
        time.sleep(2.5)
        assert len(door.upstream.pulls()) == before == 1
        assert door.front._open == 0


def test_a_message_for_a_caller_that_went_while_flower_was_asked_is_handed_out_again(tls, people, tmp_path):
    with Door(tls, people, tmp_path, Upstream(), hold_s=1.0) as door:
        door.upstream.pause_s = 1.0
        door.upstream.answers[PULL] = [(200, message(ONE))]
        with pytest.raises(httpx.ReadTimeout):
            door.pull(timeout=0.3)
        time.sleep(1.2)
        door.upstream.pause_s = 0.0
        assert door.pull().content == door.pull().content != b""  # not confirmed yet
        assert door.pull(by="b", follow_redirects=False).content == b""  # nobody else gets it
        confirmation = ConfirmMessageReceivedRequest(message_object_id=ONE).SerializeToString()
        door.post("confirm-message-received", confirmation)
        assert door.pull(follow_redirects=False).content == b""


def test_a_message_that_nobody_wants_is_not_handed_out_for_ever(tls, people, tmp_path):
    with Door(tls, people, tmp_path, Upstream(), hold_s=0.0) as door:
        door.upstream.answers[PULL] = [(200, message(ONE))]
        assert [bool(door.pull().content) for _ in range(5)] == [True, True, True, False, False]
        door.upstream.answers[PULL] = [(200, message(TWO))]
        assert door.pull().content
        door.upstream.answers[FLEET + "get-run"] = (403, b"{}")  # its run is over
        door.post("get-run")
        assert not door.pull().content
