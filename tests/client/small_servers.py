"""Servers of a few lines on loopback: HTTP over TLS or not, silent ones, proxies that tunnel or refuse."""

import contextlib
import socket
import ssl
import threading
from email.utils import formatdate
from pathlib import Path

from common.child_process import ChildProcess
from common.flower_programs import flower_environment, free_port, program
from common.node_keys import load_public_key
from tests.client.certificates import Authority


class SmallServer:
    """Accepts on a free port of loopback and handles every connection in a thread of its own."""

    def __init__(self, handle):
        self._handle, self.asked = handle, []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._serve, daemon=True)]

    @property
    def port(self):
        return self._socket.getsockname()[1]

    def __enter__(self):
        self._threads[0].start()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join(10)

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._one, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _one(self, connection):
        connection.settimeout(10)
        with connection, contextlib.suppress(OSError):
            self._handle(connection, self.asked)


def head_of(connection):
    """The request's head, and whatever of the body came with it."""
    content = b""
    while b"\r\n\r\n" not in content:
        content += connection.recv(65536) or (_ for _ in ()).throw(ConnectionError)
    return content


def http_answer(status, body=b"", **headers):
    lines = [f"HTTP/1.1 {status} Words", f"Content-Length: {len(body)}", "Connection: close"]
    headers.setdefault("Date", formatdate(usegmt=True))
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def tls_server(certificate: Path, key: Path, answer: bytes):
    """Takes a TLS connection and gives `answer` to any request."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def handle(connection, asked):
        with context.wrap_socket(connection, server_side=True) as secure:
            asked.append(head_of(secure))
            secure.sendall(answer)
            with contextlib.suppress(OSError):
                secure.unwrap()

    return SmallServer(handle)


def plaintext_server(answer: bytes):
    def handle(connection, asked):
        asked.append(connection.recv(65536))
        connection.sendall(answer)

    return SmallServer(handle)


def silent_server():
    """Takes the connection and says nothing until the other side hangs up."""

    def handle(connection, asked):
        while connection.recv(65536):
            asked.append(b"")

    return SmallServer(handle)


def hanging_up_server():
    return SmallServer(lambda connection, asked: asked.append(connection.recv(65536)))


def proxy(refusal: bytes = b""):
    """An HTTP proxy for CONNECT: tunnels, or gives `refusal`; `asked` has what it was asked for."""

    def handle(connection, asked):
        head = head_of(connection).decode()
        asked.append(head)
        if refusal:
            connection.sendall(refusal)
            return
        host, _, port = head.split()[1].rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as other:
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_copy, args=(other, connection), daemon=True)
            back.start()
            _copy(connection, other)
            back.join(10)

    return SmallServer(handle)


def _copy(source, target):
    with contextlib.suppress(OSError):
        while content := source.recv(65536):
            target.sendall(content)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class SuperLink:
    """Flower's own server over TLS with node authentication, as the operator runs it behind the front."""

    def __init__(self, folder: Path, authority: Authority):
        self.authority, self.port, self._folder = authority, free_port(), folder
        certificate, key = authority.issue(folder / "tls")
        (folder / "ca.crt").write_text(authority.pem)
        (folder / "secret").write_bytes(b"x" * 32)
        command = [program("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(certificate)]
        command += ["--ssl-keyfile", str(key), "--enable-supernode-auth"]
        command += ["--database", str(folder / "superlink.db"), "--isolation", "process"]
        command += ["--superexec-auth-secret-file", str(folder / "secret")]
        command += ["--disable-runtime-dependency-installation"]
        self.process = ChildProcess(
            command, log=folder / "superlink.log", env=flower_environment(folder / "home")
        )

    def __enter__(self):
        self.process.start()
        return self

    def __exit__(self, *_):
        self.process.stop(10)

    def control(self):
        from flwr.supercore.control import ControlHttpClient

        address, ca = f"127.0.0.1:{self.port}", self.authority.pem.encode()
        return ControlHttpClient.from_server_address(address, False, ca, interceptors=[])

    def register(self, public: Path, name: str) -> int:
        from flwr.proto.control_pb2 import RegisterNodeRequest

        pem = load_public_key(public).pem
        with contextlib.closing(self.control()) as control:
            return control.RegisterNode(RegisterNodeRequest(public_key=pem, name=name)).node_id

    def unregister(self, node_id: int):
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with contextlib.closing(self.control()) as control:
            control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def status_of(self, node_id: int) -> str:
        from flwr.proto.control_pb2 import ListNodesRequest

        with contextlib.closing(self.control()) as control:
            nodes = control.ListNodes(ListNodesRequest()).nodes_info
        return next(node.status for node in nodes if node.node_id == node_id)
