"""Somebody else listens where the SuperNode should: the worker tells it nothing and takes nothing from it."""

import contextlib
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from flwr.proto.runtime_pb2 import AcquireTaskResponse

from client.deployment.hospital_folder import HospitalFolder
from client.deployment.runtime_certificate import make_certificate, trusting
from client.deployment.tasks import TaskSource
from common.flower_programs import free_port
from tests.client.certificates import Authority
from tests.client.deployment.running_hospital import RunningHospital, wait_for
from tests.client.small_hospital import charges


class TalkingServer(ThreadingHTTPServer):
    """Gives one answer to every request and keeps what it was asked for; over TLS with a certificate."""

    daemon_threads = True

    def __init__(self, answer=(200, b"", {}), *, port=0, certificate=None):
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                owner.asked.append((self.path, body))
                status, content, headers = owner.answer(self.path) if callable(owner.answer) else owner.answer
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", port), Handler)
        self.asked, self.answer, self.connections = [], answer, 0
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def process_request(self, request, client_address):
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, *_):
        pass

    def __exit__(self, *_):
        self.shutdown()
        super().__exit__()


TASK = (200, AcquireTaskResponse(token="mine").SerializeToString(), {"content-type": "application/protobuf"})


@contextlib.contextmanager
def looked_for_a_task(port, tls):
    source = TaskSource(f"127.0.0.1:{port}", b"s" * 32, tls)
    task = source.take()
    yield task
    source._client.close()
    if task:
        task._client.close()


def test_the_right_certificate_is_taken_and_no_other(tmp_path):
    certificate, key = make_certificate()
    own = tmp_path / "own.crt", tmp_path / "own.key"
    for path, content in zip(own, (certificate, key), strict=True):
        path.write_bytes(content)
    tls = trusting(certificate.decode())
    with TalkingServer(TASK, certificate=own) as server, looked_for_a_task(server.port, tls) as task:
        assert task is not None
        assert len(server.asked) == 1
    for other in (None, Authority().issue(tmp_path / "other")):
        with (
            TalkingServer(TASK, certificate=other) as impostor,
            looked_for_a_task(impostor.port, tls) as task,
        ):
            assert task is None
            assert (impostor.connections, impostor.asked) == (1, [])


@pytest.mark.faults
def test_an_impostor_on_the_free_port_learns_nothing(tmp_path):
    """The server is away, so no SuperNode has the port: anybody may listen there."""
    hospital = RunningHospital(tmp_path / "north", Authority(), free_port())
    hospital.start()
    try:
        wait_for(lambda: hospital.work.phase == "idle", within_s=60)
        for own in (None, Authority().issue(tmp_path / "own")):
            with TalkingServer(TASK, port=hospital.runtime_port, certificate=own) as impostor:
                wait_for(lambda: impostor.connections > 3, within_s=20, what="looks for a task")  # noqa: B023
                time.sleep(1)
                assert impostor.asked == []
        assert list(charges(hospital.toml)) == []
        assert (hospital.work.phase, hospital.work.done, hospital.work.lost) == ("idle", 0, 0)
    finally:
        hospital.end()


def test_the_certificate_is_made_at_every_start_for_the_owner_only(tmp_path):
    hospital = RunningHospital(tmp_path / "north", Authority(), free_port())
    folder = HospitalFolder(hospital.folder)
    seen = set()
    for _ in range(2):
        folder.prepare(folder.enrolment(), folder.key(folder.enrolment()))
        seen.add(folder.runtime_key.read_bytes())
        assert folder.runtime_key.stat().st_mode & 0o777 == 0o600
    assert len(seen) == 2
