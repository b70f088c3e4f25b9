"""Facts 1 and 2 of Flower's deployment: what a bare SuperLink lets anybody do, and that our door does not."""

import socket

import httpx
import pytest
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from common.bundle.bundle import bundle_bytes, bundle_sha256
from common.health import Health, ask_health
from common.node_keys import fingerprint_of_pem
from server.provisioning.roster import read_roster, revoke
from tests.server.deployment.small_federation import Hospital, https, open_grid, until

pytestmark = [pytest.mark.faults, pytest.mark.ci]


def control_at(opened, port):
    return ControlHttpClient.from_server_address(
        f"127.0.0.1:{port}", False, opened.authority, interceptors=[]
    )


def runtime_at(opened, port):
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    return RuntimeHttpClient.from_server_address(
        f"127.0.0.1:{port}", False, opened.authority, interceptors=[version]
    )


def refused_with(call, request):
    with pytest.raises(httpx.HTTPStatusError) as refused:
        call(request)
    return refused.value.response.status_code


def test_a_bare_superlink_takes_nodes_and_runs_from_anybody_and_our_door_none(opened):
    key = opened.stranger.public_key
    register = RegisterNodeRequest(public_key=key.pem, name="intruder")
    start = StartRunRequest(fab=Fab(hash_str=bundle_sha256(), content=bundle_bytes()))
    outside = control_at(opened, opened.port)
    assert refused_with(outside.RegisterNode, register) == 404
    assert refused_with(outside.StartRun, start) == 404
    assert refused_with(outside.ListNodes, ListNodesRequest()) == 404
    inside = control_at(opened, opened.config.network.superlink_port)
    node_id = inside.RegisterNode(
        register
    ).node_id  # nothing asks who we are: this is why it stays on loopback
    assert node_id
    assert inside.StartRun(start).run_id
    inside.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
    inside.close()
    outside.close()
    with opened.control() as control:
        assert control.stop_stale_runs() == 1
        assert control.stop_stale_runs() == 0


def test_a_task_is_given_only_for_the_secret_and_never_through_our_door(opened):
    request = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    for port, status in ((opened.config.network.superlink_port, 401), (opened.port, 404)):
        client = runtime_at(opened, port)
        assert refused_with(client.AcquireTask, request) == status
        client.close()


def test_nothing_but_the_door_listens_elsewhere_than_on_loopback(opened):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = probe.getsockname()[0]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((address, opened.config.network.superlink_port), timeout=2)


def test_the_door_says_who_it_is_in_the_name_of_our_authority(opened):
    with https(opened.folder, opened.port) as client:
        answer = client.post("/v1/fleet/get-run", headers={"content-type": "application/protobuf"})
        assert answer.status_code == 401
        assert bundle_sha256() in answer.headers["x-hospital-federation"]
        assert client.get("/health").status_code == 404


def test_a_supernode_connects_with_an_enrolled_key_only(opened):
    opened.stranger.start(worker=False)
    opened.a.start(worker=False)
    with opened.control() as control:
        until(lambda: control.online().get(opened.a.public_key.fingerprint))
        assert opened.stranger.public_key.fingerprint not in control.online()
    until(lambda: not opened.stranger.supernode.is_running)
    assert "Exit Code: 305" in "\n".join(opened.stranger.supernode.last_lines(20))


def test_only_the_roster_is_asked_whatever_registers_itself(opened, caplog):
    intruder = Hospital(opened.folder, "intruder", enrol=False)
    inside = control_at(opened, opened.config.network.superlink_port)
    inside.RegisterNode(RegisterNodeRequest(public_key=intruder.public_key.pem, name="a"))
    inside.close()
    # The door would refuse it; it has got behind it, as a user of the operator's machine can.
    intruder.start(worker=False, address=f"127.0.0.1:{opened.config.network.superlink_port}")
    if not opened.a.supernode:
        opened.a.start(worker=False)
    with opened.control() as control:
        until(lambda: sum(control.online().values()) == 2)
        control.start_run()
        grid = open_grid(opened.folder)
        grid.audit = opened.folder.path / "audit.jsonl"
        until(lambda: list(grid.get_node_ids()))
        node = next(iter(grid.get_node_ids()))
        assert [grid.enrolled_as(n).name for n in grid.get_node_ids()] == ["a"]
        assert fingerprint_of_pem(intruder.public_key.pem) in grid.audit.read_text()
        assert len(grid.audit.read_text().splitlines()) == 1
        assert caplog.text.count(intruder.public_key.fingerprint) == 1

        # Enforcing the roster puts it out; a revoked hospital is not asked any more, and cannot come back.
        control.enforce(read_roster(opened.folder.roster))
        until(lambda: not intruder.supernode.is_running, 45)
        revoke(opened.folder.roster, "a")
        until(lambda: list(grid.get_node_ids()) == [], 2)
        assert grid.enrolled_as(node) is None
        assert control.enforce(read_roster(opened.folder.roster)).done == ["a may no longer connect"]
        until(lambda: not opened.a.supernode.is_running, 45)
        grid.close()
        control.stop_stale_runs()
    intruder.stop()


def test_nobody_answers_for_the_health_of_a_server_that_was_not_started(opened):
    assert ask_health(opened.config.network.health_port, timeout_s=0.5) is Health.UNREACHABLE
