"""The front before an upstream of ten lines, and hospitals that sign as a SuperNode does.

A test file takes the fixtures by `door, people, tls = front_door.door, front_door.people, front_door.tls`.
"""

import asyncio
import datetime
import socket
import ssl
import threading
import time
from base64 import b64encode

import httpx
import pytest
import uvicorn
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from starlette.responses import Response

from common.node_keys import load_private_key, load_public_key, make_key
from server.deployment.bell import Bell
from server.deployment.caller import TIMESTAMP_HEADER
from server.deployment.front import FLEET, PULL, Front, FrontSettings
from server.deployment.front_process import configuration, new_loop
from server.deployment.news import News
from server.provisioning.certificates import issue_server_certificate, make_authority
from server.provisioning.roster import enroll, new_roster

ONE_MB = 2**20


class Signer:
    """A key pair; `headers` are those of Flower's own interceptor, at a clock that may be wrong."""

    def __init__(self, folder, name):
        self.name, self.path = name, folder / name
        make_key(self.path, folder / f"{name}.pub", comment=name)
        self.key, self.public = load_private_key(self.path), load_public_key(folder / f"{name}.pub")

    def headers(self, *, ahead_s=0.0):
        request = httpx.Request("POST", "https://x")
        context = ProtobufRequestContext(rpc_method="", message=None, request=request)
        NodeAuthHttpInterceptor(self.key, self.key.public_key()).intercept(context, lambda c: c)
        headers = {k: v for k, v in request.headers.items() if k.startswith("flwr-")}
        if ahead_s:
            moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead_s)
            headers[TIMESTAMP_HEADER] = moment.isoformat()
            signature = sign_message(self.key, headers[TIMESTAMP_HEADER].encode())
            headers["flwr-signature"] = b64encode(signature).decode()
        return headers


class Upstream:
    """Answers what `answers` says for a path, and 200 with nothing otherwise; keeps what it was asked.

    While `may_answer` is not set, it holds its answers back.
    """

    def __init__(self):
        self.answers, self.asked, self.pause_s = {}, [], 0.0
        self.may_answer = threading.Event()
        self.may_answer.set()

    async def __call__(self, scope, receive, send):
        body = b""
        while (event := await receive())["type"] == "http.request":
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        self.asked.append((time.monotonic(), scope["path"], body))
        await asyncio.sleep(self.pause_s)
        while not self.may_answer.is_set():
            await asyncio.sleep(0.01)
        answer = self.answers.get(scope["path"], (200, b""))
        status, content = answer.pop(0) if isinstance(answer, list) and answer else answer or (200, b"")
        await Response(content, status, media_type="application/protobuf")(scope, receive, send)

    def pulls(self):
        return [at for at, path, _ in self.asked if path == PULL]


class Served:
    """An application under uvicorn with TLS, in a thread."""

    def __init__(self, config, factory=None):
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.server, self.factory = uvicorn.Server(config), factory
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        with asyncio.Runner(loop_factory=self.factory) as runner:
            runner.run(self.server.serve(sockets=[self.socket]))

    def __enter__(self):
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


class Door:
    """The front as it is served in operation; hospitals `a` and `b` are enrolled, `stranger` is not."""

    def __init__(self, tls, people, state, upstream, **options):
        self.tls, self.upstream, self.people = tls, upstream, people
        self.bell, self.news = Bell(state / "bell"), News(state / "replies")
        self.roster = state / "roster.json"
        new_roster(self.roster)
        for name in ("a", "b"):
            enroll(self.roster, name=name, key=people[name].public, enrolled_patients=10)
        files = {"ssl_certfile": tls[3], "ssl_keyfile": tls[2]}
        plain = {"lifespan": "off", "ws": "none", "log_level": "error", "timeout_graceful_shutdown": 1}
        self.inner = Served(uvicorn.Config(upstream, **files, **plain))
        settings = {"hold_s": 1.0, "max_body_bytes": ONE_MB, "max_requests": 8} | options
        settings |= {"upstream": f"127.0.0.1:{self.inner.port}", "authority": tls[1], "state": state}
        self.front = Front(FrontSettings(roster=self.roster, **settings))
        config = configuration(self.front, tls[3], tls[2], settings["max_requests"])
        self.outer = Served(config, new_loop)

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
        base = f"https://127.0.0.1:{self.outer.port}"
        settings = {"timeout": 10, "follow_redirects": True} | options
        return httpx.Client(base_url=base, verify=self.context, trust_env=False, **settings)

    @property
    def context(self):
        return ssl.create_default_context(cafile=str(self.tls[1]))

    def connect(self):
        plain = socket.create_connection(("127.0.0.1", self.outer.port), timeout=10)
        return self.context.wrap_socket(plain, server_hostname="localhost")

    def post(self, call, content=b"", *, by="a", ahead_s=0.0, **headers):
        signed = self.people[by].headers(ahead_s=ahead_s)
        return self.client.post(FLEET + call, content=content, headers=signed | headers)

    def pull(self, *, by="a", ahead_s=0.0, held="", **options):
        with self.new_client(**options) as client:
            return client.post(PULL + held, headers=self.people[by].headers(ahead_s=ahead_s))


def message(name, *, ttl=60.0):
    metadata = Metadata(message_id=name, created_at=time.time(), ttl=ttl)
    return PullMessagesResponse(messages_list=[Message(metadata=metadata)]).SerializeToString()


def head(call, length, headers):
    """The head of a request whose body is still to come."""
    lines = [f"POST {FLEET}{call} HTTP/1.1", "host: x", f"content-length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """Paths of ca.key, ca.crt, server.key, server.crt."""
    folder = tmp_path_factory.mktemp("tls")
    paths = [folder / name for name in ("ca.key", "ca.crt", "server.key", "server.crt")]
    make_authority(paths[0], paths[1], federation="test")
    issue_server_certificate(
        paths[2], paths[3], authority_key=paths[0], authority=paths[1], names=("localhost", "127.0.0.1")
    )
    return paths


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Keys by name; who is enrolled stands in a Door's roster."""
    folder = tmp_path_factory.mktemp("people")
    return {name: Signer(folder, name) for name in ("a", "b", "stranger")}


@pytest.fixture
def door(tls, people, tmp_path):
    with Door(tls, people, tmp_path, Upstream()) as door:
        yield door
