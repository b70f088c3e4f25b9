"""Processes killed, lies told, cables cut: the hospital is back by itself and nothing is charged twice."""

import contextlib
import os
import signal
import time

import pytest

from common import messages
from tests.client.certificates import Authority
from tests.client.deployment.running_hospital import (
    Federation,
    RunningHospital,
    answer_to,
    ask,
    hello,
    is_alive,
    kill,
    send,
    wait_for,
)
from tests.client.small_hospital import charges, make_plan, training_request
from tests.deployment.relay import Cable, LyingProxy

pytestmark = pytest.mark.faults


@contextlib.contextmanager
def operation(folder, *, between=None, **hospital):
    """A server and a hospital that is connected, with `between` on the way."""
    hospital = {"noise_multiplier": 50.0, "epsilon": 1e6, **hospital}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Federation(folder / "server", Authority()))
        way = stack.enter_context(between(server)) if between else server
        north = RunningHospital(folder / "north", server.authority, way.port, **hospital)
        node = wait_for(lambda: server.register(north.public, "north"), within_s=30)
        stack.callback(north.end)
        north.start()
        north.await_ready()
        yield server, north, node, way


def long_round(run_id):
    """Steps for about half a minute: long enough to be killed in."""
    data, model = {"image-size": 28}, {"name": "cnn-small"}
    plan = make_plan(privacy={"local-steps": 1000}, model=model, data=data)
    return training_request(plan, run_id=run_id)


def test_a_worker_killed_between_tasks_is_replaced(tmp_path):
    with operation(tmp_path) as (server, north, node, _):
        grid = server.start_run()
        ask(grid, node, hello())
        before = north.processes()
        kill(before["worker"])
        assert messages.HOSPITAL in ask(grid, node, hello()).content
        after = north.processes()
        assert after["worker"] != before["worker"]
        assert after["supernode"] == before["supernode"], "nobody waited for that worker"


def test_a_worker_killed_in_a_round_is_replaced_and_the_round_charged_once(tmp_path):
    with operation(tmp_path) as (server, north, node, _):
        grid = server.start_run()
        request = long_round("killed")
        lost = send(grid, node, request)
        wait_for(lambda: charges(north.toml), within_s=40, what="a charge")
        killed = time.monotonic()
        kill(north.processes()["worker"])
        assert answer_to(grid, lost, within_s=40).has_error(), "the server is told at once"
        north.await_ready()
        assert messages.HOSPITAL in ask(grid, node, hello()).content
        back_s = time.monotonic() - killed
        assert back_s < 30, back_s
        assert messages.ARRAYS in ask(grid, node, request, within_s=240).content
        assert len(charges(north.toml)) == 1


def test_a_killed_supernode_is_replaced_at_once(tmp_path):
    with operation(tmp_path) as (server, north, node, _):
        grid = server.start_run()
        request = training_request(run_id="first")
        ask(grid, node, request)
        killed = time.monotonic()
        kill(north.processes()["supernode"])
        wait_for(lambda: not north.status()["connected"], within_s=5)
        north.await_ready(within_s=40)
        assert time.monotonic() - killed < 40
        again = ask(grid, node, request)
        assert messages.ARRAYS in again.content, "the worker has outlived its SuperNode"
        assert len(charges(north.toml)) == 1


@pytest.mark.parametrize("is_noted", [True, False], ids=["noted session", "forgotten session"])
def test_everything_killed_and_started_again_at_once_needs_nobody(tmp_path, is_noted):
    with operation(tmp_path) as (server, north, node, _):
        grid = server.start_run()
        ask(grid, node, hello())
        pids = [*north.processes().values(), north.pid]
        for pid in pids:
            kill(pid)
        north.wait()
        (north.state / "status.json").unlink()
        if not is_noted:
            (north.state / "session.json").unlink()
        north.start()
        north.await_ready(within_s=40 if is_noted else 100)
        assert ("old session to expire" in north.said()) == (not is_noted)
        assert messages.HOSPITAL in ask(grid, node, hello()).content


def test_the_supervisors_death_ends_its_processes(tmp_path):
    with operation(tmp_path) as (server, north, node, _):
        grid = server.start_run()
        send(grid, node, long_round("orphan"))
        wait_for(lambda: north.work.phase == "busy" and charges(north.toml), within_s=40)
        processes = north.processes()
        assert set(processes) == {"supernode", "worker"}
        kill(north.pid)
        wait_for(lambda: not any(is_alive(pid) for pid in processes.values()), within_s=15)
        assert north.wait() == -signal.SIGKILL


def one_500(server):
    folder = server.process.log.parent
    return LyingProxy(
        f"127.0.0.1:{server.port}",
        certificate=folder / "tls" / "server.crt",
        key=folder / "tls" / "server.key",
        authority=folder / "ca.crt",
    )


@pytest.mark.parametrize("call", ["pull-messages", "send-node-heartbeat", "pull-object", "push-messages"])
def test_one_500_costs_a_round_at_most(tmp_path, call):
    with operation(tmp_path, between=one_500) as (server, north, node, proxy):
        grid = server.start_run()
        proxy.faults[call, 500] = 1
        if call in ("pull-object", "push-messages"):
            send(grid, node, hello())
        wait_for(lambda: proxy.lies, within_s=40, what=f"a 500 to {call}")
        lied = time.monotonic()
        if call in ("pull-messages", "send-node-heartbeat"):
            # Its loop or its heart has stopped; its process lives on.
            wait_for(lambda: "starting it anew" in north.said(), within_s=90, what="a restart")
        wait_for(lambda: answers(grid, node), within_s=120, what="an answered hello")
        assert time.monotonic() - lied < 100


def answers(grid, node):
    """Whether a hello is answered; a server that sees an offline node says so in an error."""
    with contextlib.suppress(AssertionError):
        return ask(grid, node, hello(), within_s=15).has_content()
    return False


@pytest.mark.parametrize("cut_s", [45, 150])
def test_a_cut_of_the_network_needs_nobody(tmp_path, cut_s):
    def cable(server):
        return Cable(("127.0.0.1", server.port))

    with operation(tmp_path, between=cable) as (server, north, node, way):
        grid = server.start_run()
        before = north.processes()
        way.is_cut = True
        time.sleep(cut_s)
        assert north.said().count("\n") < 12, "the log does not fill while the network is away"
        way.is_cut = False
        wait_for(lambda: answers(grid, node), within_s=90, what="an answered hello")
        # Whether Flower's SuperNode survives is its affair (a handshake that times out is final to it).
        assert north.processes()["worker"] == before["worker"]


def test_a_second_client_with_the_same_key_stays_outside(tmp_path):
    with operation(tmp_path) as (server, north, node, _):
        other = RunningHospital(tmp_path / "copy", server.authority, server.port)
        for name in (north.key, north.public):
            target = other.key.parent / name.name
            target.write_bytes(name.read_bytes())
        other.enrol("north")
        other.start()
        try:
            wait_for(lambda: "already connected from elsewhere" in other.said(), within_s=120)
            assert server.status_of(node) == "online"
            assert "supernode" not in other.processes()
            assert messages.HOSPITAL in ask(server.start_run(), node, hello()).content
        finally:
            other.end()


def test_a_worker_stopped_for_ever_in_a_task_is_replaced(tmp_path):
    """SIGSTOP stands for a round that never ends; the policy's longest round counts."""
    with operation(tmp_path, maximum_round_s=1.0) as (server, north, node, _):
        grid = server.start_run()
        ask(grid, node, hello())
        worker = north.processes()["worker"]
        lost = send(grid, node, long_round("stuck"))
        wait_for(lambda: north.work.phase == "busy", within_s=20)
        os.kill(worker, signal.SIGSTOP)
        wait_for(lambda: not is_alive(worker), within_s=90, what="the end of a stuck worker")
        assert answer_to(grid, lost, within_s=60).has_error()
        wait_for(lambda: answers(grid, node), within_s=60, what="an answered hello")
