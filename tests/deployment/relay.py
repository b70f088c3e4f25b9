"""Between hospital and server: a cable that can be cut, and a proxy that lies once."""

import contextlib
import socket
import ssl
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx


class Cable:
    """A TCP relay on loopback; cut, it swallows everything and lets nobody in, as a firewall that drops."""

    def __init__(self, target: tuple[str, int], *, port: int = 0) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.is_cut = False
        self.passed = bytearray()
        """Every byte that went through, both ways."""
        self.connections = 0
        self._open: list[socket.socket] = []
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Cable":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._listener.close()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(near)
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        while self.is_cut and not self._closed:
            time.sleep(0.05)
        try:
            far = socket.create_connection(self._target, timeout=10)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        self._open.append(far)
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                if self.is_cut:  # lost on the way; the connection is of no use afterwards either
                    while self.is_cut and not self._closed:
                        time.sleep(0.05)
                    break
                self.passed += piece
                sink.sendall(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class LyingProxy:
    """A TLS reverse proxy with the server's own certificate that answers named paths wrongly, once each."""

    def __init__(self, target: str, *, certificate: Path, key: Path, authority: Path) -> None:
        self.faults: Counter[tuple[str, int]] = Counter()
        """(last part of the path, status): how often it still answers so."""
        self.lies: list[tuple[str, int]] = []
        self.asked: list[tuple[str, bytes]] = []
        """Last part of the path and body of every request, decrypted."""
        upstream = httpx.Client(
            base_url=f"https://{target}",
            verify=ssl.create_default_context(cafile=str(authority)),
            timeout=60,
            trust_env=False,
        )
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                name = self.path.split("?")[0].rsplit("/", 1)[-1]
                owner.asked.append((name, body))
                status, content, headers = owner._lie(name) or owner._truth(upstream, self, body)
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._upstream = upstream
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "LyingProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._upstream.close()

    def _lie(self, name: str) -> tuple[int, bytes, dict[str, str]] | None:
        for (path, status), left in self.faults.items():
            if path == name and left > 0:
                self.faults[path, status] -= 1
                self.lies.append((path, status))
                return status, b"{}", {"content-type": "application/json"}
        return None

    def _truth(
        self, upstream: httpx.Client, handler: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        dropped = {"host", "connection", "content-length", "transfer-encoding"}
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in dropped}
        try:
            answer = upstream.post(handler.path, content=body, headers=headers)
        except httpx.HTTPError:
            return 503, b"", {}
        kept = {"content-type", "x-hospital-federation"}
        return answer.status_code, answer.content, {k: v for k, v in answer.headers.items() if k in kept}
