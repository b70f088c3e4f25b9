"""deploy/nginx/fleet.conf under the real nginx, before a small TLS server that records what reaches it."""

import contextlib
import http.client
import http.server
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.flower_programs import free_ports
from server.deployment.front import CLOSED_PATHS, HEADER, OPEN_PATHS
from server.provisioning.certificates import issue_server_certificate, make_authority

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
FLEET_CONF = Path(__file__).resolve().parents[1] / "deploy" / "nginx" / "fleet.conf"
PULL = "/v1/fleet/pull-messages"
SURROUNDINGS = """
daemon off; pid nginx.pid; error_log stderr warn; worker_processes 1; {user}
events {{ worker_connections 512; }}
http {{ access_log off; client_body_temp_path body; proxy_temp_path proxy; include fleet.conf; }}
"""

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed on this machine")


@dataclass
class Upstream:
    """What reached the server behind nginx."""

    seen: list[tuple[str, dict[str, str], int]] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    held: threading.Event = field(default_factory=threading.Event)


class Recorder(http.server.BaseHTTPRequestHandler):
    """Answers as the header x-test asks: a status, `hold`, or `drop`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        upstream = self.server.upstream
        body = self.rfile.read(int(self.headers["content-length"]))
        upstream.seen.append((self.path, dict(self.headers), len(body)))
        wish = self.headers.get("x-test", "200")
        if wish == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if wish == "hold":
            upstream.held.set()
            self.connection.settimeout(20)
            if not self.connection.recv(1):
                upstream.hung_up.set()
            self.close_connection = True
            return
        if wish == "late":
            time.sleep(3)
        self.send_response(200 if wish == "late" else int(wish))
        self.send_header(HEADER, "0.1.0;schema=1;bundle=00")
        if wish == "307":
            self.send_header("location", f"{PULL}?held=1")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def get_request(self):
        taken, address = super().get_request()
        self.connections.append(taken)
        return taken, address

    def handle_error(self, request, client_address):
        pass

    def end(self):
        """Close the connections that nginx keeps, too."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def make_folder(folder):
    make_authority(folder / "ca/ca.key", folder / "ca/ca.crt", federation="nginx")
    issue_server_certificate(
        folder / "tls/server.key",
        folder / "tls/server.crt",
        authority_key=folder / "ca/ca.key",
        authority=folder / "ca/ca.crt",
        names=("127.0.0.1", "localhost"),
    )


def serve(folder, port=0):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls/server.crt", folder / "tls/server.key")
    server = Server(("127.0.0.1", port), Recorder)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.upstream, server.connections = Upstream(), []
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("operator")
    for name in ("ca", "tls", "nginx"):
        (path / name).mkdir()
    make_folder(path)
    return path


@pytest.fixture(scope="module")
def door(folder):
    """nginx with our configuration; yields its port and the port that it asks behind."""
    port, behind = free_ports(2)
    place = folder / "nginx"
    text = FLEET_CONF.read_text().replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
    text = text.replace("server 127.0.0.1:8443", f"server 127.0.0.1:{behind}")
    (place / "fleet.conf").write_text(text.replace("/var/lib/flower-server/federation", str(folder)))
    user = "user root;" if os.getuid() == 0 else ""
    (place / "nginx.conf").write_text(SURROUNDINGS.format(user=user))
    command = [NGINX, "-p", str(place), "-c", "nginx.conf", "-e", "stderr"]
    subprocess.run([*command, "-t"], check=True, timeout=20, capture_output=True)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for_port(port)
            yield port, behind
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture
def upstream(door, folder):
    server = serve(folder, door[1])
    yield server.upstream
    server.end()


def wait_for_port(port):
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError


@pytest.fixture
def ask(door, folder):
    """Send one request as a hospital does: it trusts the federation's authority only."""
    context = ssl.create_default_context(cafile=folder / "ca/ca.crt")
    open_ones = []

    def send(path, *, wish="200", body=b"x", method="POST", wait=True):
        connection = http.client.HTTPSConnection("127.0.0.1", door[0], context=context, timeout=40)
        open_ones.append(connection)
        headers = {"x-test": wish, "flwr-public-key": "key", "flwr-signature": "s"}
        connection.request(method, path, body=body, headers=headers)
        if not wait:
            return connection
        answer = connection.getresponse()
        return answer, answer.read()

    yield send
    for connection in open_ones:
        connection.close()


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_every_call_of_a_hospital_goes_through_unchanged(path, ask, upstream):
    answer, content = ask(path, body=b"bytes")
    assert (answer.status, content) == (200, b"bytes")
    assert answer.headers[HEADER] == "0.1.0;schema=1;bundle=00"
    [(came, headers, _)] = upstream.seen
    assert came == path
    assert headers["flwr-public-key"] == "key"
    assert headers["flwr-signature"] == "s"


def test_the_redirect_of_an_empty_pull_goes_through_with_its_count(ask, upstream):
    answer, _ = ask(f"{PULL}?held=3", wish="307")
    assert (answer.status, answer.headers["location"]) == (307, f"{PULL}?held=1")
    assert upstream.seen[0][0] == f"{PULL}?held=3"


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/docs", "/openapi.json", "/health", "/v1/fleet/", "/v1/fleet/get-run/", "/v1/fleet/unknown"),
        *("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task"),
        *("/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/V1/fleet/get-run"),
        *("/v1/fleet/get-run;/../../control/start-run", "//v1/control/list-runs", "/v1/fleet/get-run%00"),
    ],
)
def test_everything_else_ends_at_the_door(path, ask, upstream):
    assert ask(path)[0].status in {400, 403, 404}
    assert upstream.seen == []


@pytest.mark.parametrize("path", sorted(CLOSED_PATHS))
def test_nobody_registers_a_hospital_from_outside(path, ask, upstream):
    assert ask(path)[0].status == 403
    assert ask(path.replace("fleet", "%66leet"))[0].status == 403
    assert upstream.seen == []


def test_only_the_cleaned_path_goes_on(ask, upstream):
    assert ask("/v1/control/../fleet//get-run")[0].status == 200
    assert upstream.seen[0][0] == "/v1/fleet/get-run"


def test_only_post_goes_through(ask, upstream):
    assert ask(PULL, method="GET")[0].status == 403
    assert upstream.seen == []


@pytest.mark.parametrize("status", ["429", "500", "502", "503", "504"])
def test_whatever_would_kill_a_supernode_becomes_503(status, ask, upstream):
    assert ask(PULL, wish=status)[0].status == 503
    assert len(upstream.seen) == 1


@pytest.mark.parametrize("status", ["400", "401", "403", "412"])
def test_answers_that_mean_something_to_a_hospital_stay(status, ask, upstream):
    answer, content = ask("/v1/fleet/activate-node", wish=status, body=b"why")
    assert (answer.status, content) == (int(status), b"why")
    assert HEADER in answer.headers


def test_a_server_that_is_away_is_503(door, ask):
    assert ask(PULL)[0].status == 503


def test_a_lost_answer_is_not_asked_for_again(ask, upstream):
    assert ask(PULL, wish="drop")[0].status == 503
    assert len(upstream.seen) == 1


def test_a_server_of_another_authority_is_not_believed(door, ask, tmp_path):
    for name in ("ca", "tls"):
        (tmp_path / name).mkdir()
    make_folder(tmp_path)
    server = serve(tmp_path, door[1])
    try:
        assert ask(PULL)[0].status == 503
        assert server.upstream.seen == []
    finally:
        server.end()


def test_flowers_pieces_fit_and_larger_bodies_are_refused(ask, upstream):
    answer, content = ask("/v1/fleet/push-object", body=bytes(6_000_000))
    assert (answer.status, len(content)) == (200, 6_000_000)
    # It may be refused so early that the rest cannot be sent.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):
        assert ask("/v1/fleet/push-object", body=bytes(17 * 2**20))[0].status == 413
    assert [size for _, _, size in upstream.seen] == [6_000_000]


def test_a_held_pull_is_waited_for(ask, upstream):
    assert ask(PULL, wish="late")[0].status == 200


def test_when_the_caller_hangs_up_the_server_is_told(ask, upstream):
    connection = ask(PULL, wish="hold", wait=False)
    assert upstream.held.wait(5)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert upstream.hung_up.wait(5)


def test_one_address_cannot_take_every_place(ask, upstream):
    for _ in range(64):
        ask(PULL, wish="hold", wait=False)
    ends = time.monotonic() + 20
    while len(upstream.seen) < 64 and time.monotonic() < ends:
        time.sleep(0.05)
    assert ask(PULL)[0].status == 503
    assert len(upstream.seen) == 64


def test_plain_http_is_refused(door, upstream):
    connection = http.client.HTTPConnection("127.0.0.1", door[0], timeout=10)
    connection.request("POST", PULL, body=b"x")
    assert connection.getresponse().status == 400
    connection.close()
    assert upstream.seen == []
