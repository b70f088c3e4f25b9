"""gRPC health on loopback (grpc.health.v1): what `status` and container probes ask.

Service "" is the whole side; parts have names of their own. gRPC takes a tenth of a second to import: it is
imported once a side is there to be asked.
"""

import socket
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from common.errors import FederationError

if TYPE_CHECKING:
    import grpc


class Health(StrEnum):
    """Answer to a question after health."""

    SERVING = "serving"
    NOT_SERVING = "not-serving"
    UNKNOWN = "unknown"
    """The side is there and has no such service."""
    UNREACHABLE = "unreachable"


class HealthServer:
    """Answers the standard health protocol on 127.0.0.1; every service starts as not serving."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._servicer = _checks()
        self._server: grpc.Server | None = None

    def start(self) -> None:
        """Begin to answer. Raises FederationError when the port is taken."""
        import grpc
        from grpc_health.v1 import health_pb2_grpc

        server = grpc.server(ThreadPoolExecutor(max_workers=2), options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        try:
            bound = server.add_insecure_port(f"127.0.0.1:{self.port}")
        except RuntimeError:
            bound = 0
        if not bound:
            raise FederationError(
                f"port {self.port} on 127.0.0.1 is in use",
                why="health is answered there, and another program has it",
                fix="end that program, or choose another health-port",
            )
        self.port = bound
        self.set("", serving=False)
        server.start()
        self._server = server

    def set(self, service: str, *, serving: bool) -> None:
        """Say whether a service works."""
        from grpc_health.v1.health_pb2 import HealthCheckResponse

        state = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        self._servicer.set(service, state)

    def stop(self) -> None:
        """Stop answering; also before the start."""
        if self._server is not None:
            self._server.stop(grace=0.2).wait()
            self._server = None


def ask_health(port: int, service: str = "", *, timeout_s: float = 2.0) -> Health:
    """Ask a side on this machine how it is; never raises."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=timeout_s).close()
    except OSError:
        return Health.UNREACHABLE
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s
            )
        except grpc.RpcError as error:
            return Health.UNKNOWN if error.code() is grpc.StatusCode.NOT_FOUND else Health.UNREACHABLE
    is_serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return Health.SERVING if is_serving else Health.NOT_SERVING


def _checks() -> Any:
    """Check and no Watch: two who watch would hold both threads, and nobody else got an answer."""
    import grpc
    from grpc_health.v1 import health

    class Checks(health.HealthServicer):  # type: ignore[misc]
        def Watch(self, request: object, context: grpc.ServicerContext) -> None:  # noqa: N802
            """Refuse at once."""
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask with Check")

    return Checks(experimental_non_blocking=False)
