"""The front alone, before an upstream of ten lines."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, Message, Metadata, PushObjectRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from starlette.responses import Response

from server.deployment import front as front_module
from server.deployment.bell import Bell
from server.deployment.front import FLEET, HEADER, OPEN_PATHS, PULL, Front, FrontSettings
from server.deployment.news import Kind, News
from server.provisioning.certificates import issue_server_certificate, make_authority

KEY = {FLEET_HTTP_PUBLIC_KEY_HEADER: "a"}
ONE_MB = 2**20


class Upstream:
    """Answers what `answers` says for a path, and 200 with nothing otherwise; keeps what it was asked."""

    def __init__(self):
        self.answers, self.asked, self.pause_s = {}, [], 0.0

    async def __call__(self, scope, receive, send):
        body = b""
        while (event := await receive())["type"] == "http.request":
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        self.asked.append((time.monotonic(), scope["path"], body))
        await asyncio.sleep(self.pause_s)
        answer = self.answers.get(scope["path"], (200, b""))
        status, content = answer.pop(0) if isinstance(answer, list) and answer else answer or (200, b"")
        await Response(content, status, media_type="application/protobuf")(scope, receive, send)

    def pulls(self):
        return [at for at, path, _ in self.asked if path == PULL]


class Served:
    """An ASGI application under uvicorn with TLS, in a thread."""

    def __init__(self, app, certificate, key, *, lifespan="off"):
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        options = {"lifespan": lifespan, "ws": "none", "log_level": "error", "server_header": False}
        config = uvicorn.Config(
            app, ssl_certfile=certificate, ssl_keyfile=key, timeout_graceful_shutdown=1, **options
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    paths = [folder / name for name in ("ca.key", "ca.crt", "server.key", "server.crt")]
    make_authority(paths[0], paths[1], federation="test")
    issue_server_certificate(
        paths[2], paths[3], authority_key=paths[0], authority=paths[1], names=("localhost", "127.0.0.1")
    )
    return paths


class Door:
    def __init__(self, tls, state, upstream, **options):
        self.tls, self.upstream = tls, upstream
        self.bell, self.news = Bell(state / "bell"), News(state / "replies")
        self.inner = Served(upstream, tls[3], tls[2])
        settings = {"hold_s": 1.0, "max_body_bytes": ONE_MB, "max_requests": 8} | options
        settings |= {"upstream": f"127.0.0.1:{self.inner.port}", "authority": tls[1], "state": state}
        self.front = Front(FrontSettings(**settings))
        self.outer = Served(self.front, tls[3], tls[2], lifespan="on")

    def __enter__(self):
        self.inner.__enter__()
        self.outer.__enter__()
        self.client = self.new_client()
        return self

    def __exit__(self, *_):
        self.client.close()
        self.outer.__exit__()
        self.inner.__exit__()

    def new_client(self, **options):
        context = ssl.create_default_context(cafile=str(self.tls[1]))
        base = f"https://127.0.0.1:{self.outer.port}"
        settings = {"timeout": 10, "follow_redirects": True} | options
        return httpx.Client(base_url=base, verify=context, trust_env=False, **settings)

    def post(self, call, content=b"", **headers):
        return self.client.post(FLEET + call, content=content, headers=KEY | headers)

    def pull(self, **options):
        with self.new_client(**options) as client:
            return client.post(PULL, headers=KEY)


@pytest.fixture
def door(tls, tmp_path):
    with Door(tls, tmp_path, Upstream()) as door:
        yield door


def message(name, *, ttl=60.0):
    metadata = Metadata(message_id=name, created_at=time.time(), ttl=ttl)
    return PullMessagesResponse(messages_list=[Message(metadata=metadata)]).SerializeToString()


def test_ten_calls_pass_and_nothing_else(door):
    assert len(OPEN_PATHS) == 10
    for path in sorted(OPEN_PATHS - {PULL}):
        assert door.client.post(path, content=b"x").status_code == 200
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
        assert ";schema=1;bundle=" in answer.headers[HEADER]
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


def test_a_superlink_that_is_away_is_503_and_comes_back(tls, tmp_path):
    with Door(tls, tmp_path, Upstream()) as door:
        real = door.front._upstream
        gone = httpx.AsyncClient(base_url="https://127.0.0.1:9", verify=False, trust_env=False)
        door.front._upstream = gone
        assert door.post("get-run").status_code == 503
        assert door.pull().status_code == 503
        door.front._upstream = real
        asyncio.run(gone.aclose())
        assert door.post("get-run").status_code == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read(door):
    assert door.post("push-object", b"x" * ONE_MB).status_code == 200
    assert door.post("push-object", b"x" * (ONE_MB + 1)).status_code == 413
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", door.outer.port)) as plain:
        context = ssl.create_default_context(cafile=str(door.tls[1]))
        with context.wrap_socket(plain, server_hostname="localhost") as connection:
            head = "POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n"
            connection.sendall(head.encode())
            assert b" 413 " in connection.recv(4096)
    assert time.monotonic() - started < 2

    def stream():
        for _ in range(40):
            yield b"x" * (ONE_MB // 8)

    with contextlib.suppress(httpx.TransportError):  # it may hang up on somebody who does not stop
        assert door.client.post(FLEET + "push-object", content=stream()).status_code == 413
    assert max(len(body) for _, _, body in door.upstream.asked) == ONE_MB


def test_more_requests_than_allowed_get_503_at_once(tls, tmp_path):
    with Door(tls, tmp_path, Upstream(), max_requests=4, hold_s=1.5) as door, ThreadPoolExecutor(8) as pool:
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


def test_a_pull_is_held_until_the_bell_and_then_answered_at_once(tls, tmp_path):
    with Door(tls, tmp_path, Upstream(), hold_s=20.0) as door, ThreadPoolExecutor(1) as pool:
        held = pool.submit(door.pull)
        while len(door.upstream.pulls()) < 1:
            time.sleep(0.01)
        time.sleep(0.3)
        assert not held.done()
        assert len(door.upstream.pulls()) == 1
        door.upstream.answers[PULL] = [(200, message("one"))]
        rung = time.monotonic()
        door.bell.ring()
        answer = held.result(timeout=5)
        assert time.monotonic() - rung < 0.2
        assert PullMessagesResponse.FromString(answer.content).messages_list[0].metadata.message_id == "one"


def test_a_held_pull_is_asked_again_every_two_seconds_without_a_bell(tls, tmp_path):
    with Door(tls, tmp_path, Upstream(), hold_s=5.0) as door:
        door.upstream.answers[PULL] = [(200, b""), (200, b""), (200, message("one"))]
        began = time.monotonic()
        assert door.pull().content
        assert 3.9 < time.monotonic() - began < 4.8
        assert len(door.upstream.pulls()) == 3


def test_holds_go_over_into_each_other_and_end_before_the_signature_ages(tls, tmp_path, monkeypatch):
    assert front_module._LONGEST_HOLDS * 25 + 25 < 305
    monkeypatch.setattr(front_module, "_LONGEST_HOLDS", 3)
    with Door(tls, tmp_path, Upstream(), hold_s=1.0) as door:
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


def test_nobody_is_asked_for_a_caller_that_has_gone(tls, tmp_path):
    with Door(tls, tmp_path, Upstream(), hold_s=20.0) as door:
        with pytest.raises(httpx.ReadTimeout):
            door.pull(timeout=0.4)
        time.sleep(0.2)
        before = len(door.upstream.pulls())
        door.upstream.answers[PULL] = [(200, message("one"))]
        door.bell.ring()
        time.sleep(2.5)
        assert len(door.upstream.pulls()) == before == 1
        assert door.front._open == 0


def test_a_message_for_a_caller_that_went_while_flower_was_asked_is_handed_out_again(tls, tmp_path):
    with Door(tls, tmp_path, Upstream(), hold_s=1.0) as door:
        door.upstream.pause_s = 1.0
        door.upstream.answers[PULL] = [(200, message("one"))]
        with pytest.raises(httpx.ReadTimeout):
            door.pull(timeout=0.3)
        time.sleep(1.2)
        door.upstream.pause_s = 0.0
        assert door.pull().content == door.pull().content != b""  # not confirmed yet
        with door.new_client(follow_redirects=False) as client:
            other = client.post(PULL, headers={FLEET_HTTP_PUBLIC_KEY_HEADER: "b"})
        assert other.content == b""  # nobody else gets it
        confirmation = ConfirmMessageReceivedRequest(message_object_id="one").SerializeToString()
        door.post("confirm-message-received", confirmation)
        assert door.pull(follow_redirects=False).content == b""


def test_a_message_that_nobody_wants_is_not_handed_out_for_ever(tls, tmp_path):
    with Door(tls, tmp_path, Upstream(), hold_s=0.0) as door:
        door.upstream.answers[PULL] = [(200, message("one"))]
        assert [bool(door.pull().content) for _ in range(5)] == [True, True, True, False, False]
        door.upstream.answers[PULL] = [(200, message("two"))]
        assert door.pull().content
        door.upstream.answers[FLEET + "get-run"] = (403, b"{}")  # its run is over
        door.post("get-run")
        assert not door.pull().content


def test_the_server_hears_when_a_reply_is_whole_and_which_are_lost(door):
    door.upstream.answers[FLEET + "push-messages"] = (
        200,
        PushMessagesResponse(session_id="s", objects_to_push=["x", "y"]).SerializeToString(),
    )
    door.upstream.answers[PULL] = [(200, message("aa")), (200, message("bb"))]
    for name in ("aa", "bb"):
        door.pull()
        confirmation = ConfirmMessageReceivedRequest(message_object_id=name).SerializeToString()
        door.post("confirm-message-received", confirmation)
    reply = Message(metadata=Metadata(reply_to_message_id="aa"))
    door.post("push-messages", PushMessagesRequest(messages_list=[reply]).SerializeToString())
    assert door.news.fresh() == [(Kind.BEGUN, "aa")]
    part = PushObjectRequest(session_id="s", object_id="x")
    door.post("push-object", part.SerializeToString())
    assert door.news.fresh() == []
    part.object_id = "y"
    door.post("push-object", part.SerializeToString())
    assert door.news.fresh() == [(Kind.WHOLE, "aa")]
    door.upstream.answers[FLEET + "activate-node"] = (412, b"{}")
    door.post("activate-node")
    assert door.news.fresh() == []
    door.upstream.answers[FLEET + "activate-node"] = (200, b"")
    door.post("activate-node")
    assert door.news.fresh() == [(Kind.LOST, "bb")]
