"""gRPC health, asked by the standard client."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import FederationError
from common.health import Health, HealthServer, ask_health


@pytest.fixture
def server():
    server = HealthServer(0)
    server.start()
    yield server
    server.stop()


def test_a_side_is_not_serving_until_it_says_so(server):
    assert ask_health(server.port) is Health.NOT_SERVING
    server.set("", serving=True)
    server.set("front", serving=False)
    assert ask_health(server.port) is Health.SERVING
    assert ask_health(server.port, "front") is Health.NOT_SERVING
    assert ask_health(server.port, "nobody") is Health.UNKNOWN


def test_nobody_there_is_unreachable(server):
    port = server.port
    server.stop()
    assert ask_health(port, timeout_s=1) is Health.UNREACHABLE


def test_a_taken_port_is_named(server):
    with pytest.raises(FederationError, match=f"port {server.port} on 127.0.0.1 is in use"):
        HealthServer(server.port).start()


def test_whoever_watches_is_sent_away_and_holds_no_thread(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watching = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=5) for _ in range(4)]
        for watch in watching:
            with pytest.raises(grpc.RpcError) as refused:
                next(watch)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert ask_health(server.port, timeout_s=2) is Health.NOT_SERVING
