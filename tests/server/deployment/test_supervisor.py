"""A whole federation on loopback: real server, real SuperNodes, workers of numpy."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from common.errors import FederationError
from common.exit_codes import ExitCode
from common.health import Health, ask_health
from server.deployment.supervisor import start
from server.provisioning.roster import revoke
from tests.server.deployment.small_federation import Hospital, Server, make_folder, until
from tests.server.fake_federation import NumpyHospital, assert_same_bits, fedavg_by_hand, model_of


@contextlib.contextmanager
def federation(path, *, names=("a", "b"), seconds=0.0, **sections):
    folder = make_folder(path / "operator", **sections)
    hospitals = [Hospital(folder, name) for name in names]
    server = Server(folder)
    try:
        yield folder, server, [hospital.start(seconds=seconds) for hospital in hospitals]
    finally:
        server.stop()
        for hospital in hospitals:
            hospital.stop()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def explained(server, folder):
    logs = [folder.federation_log, folder.superlink_log, folder.logs / "front.log"]
    return "\n".join([server.said, *(path.read_text()[-2000:] for path in logs if path.exists())])


@pytest.mark.faults
@pytest.mark.ci
def test_a_run_from_start_to_end(tmp_path):
    with federation(tmp_path) as (folder, server, hospitals):
        server.start()
        until(lambda: server.closed, 60, what=explained(server, folder))
        assert ask_health(folder.config().network.health_port, "superlink") is Health.SERVING
        assert server.wait(60) == ExitCode.COMPLETED, explained(server, folder)
        assert server.closed == [1, 2, 3]
        by_hand = fedavg_by_hand([NumpyHospital(h.name) for h in hospitals], 3)
        assert_same_bits(model_of(server.run), by_hand)
        assert all(entry["model_received"] for entry in server.result()["hospitals"])
        assert "round 2 of 3: 2 of 2 hospitals" in server.said
        assert "a is connected" in server.said
        assert json.loads(folder.server_json.read_text())["state"] == "ended"
        # Nothing of it is left running, and nothing is trained twice without being asked for.
        assert not any(alive(pid) for pid in server.children().values())
        assert server.start().wait(20) != 0
        assert "start --new" in server.said


@pytest.mark.faults
def test_a_server_that_is_killed_goes_on_in_its_round(tmp_path):
    with federation(tmp_path, seconds=1.0, federation={"rounds": 5}) as (folder, server, hospitals):
        server.start()
        until(lambda: 2 in server.closed, 60, what=explained(server, folder))
        time.sleep(0.7)  # round 3 is open
        children = server.children()
        assert set(children) == {"superlink", "front", "server process"}
        server.signal(signal.SIGKILL)
        server.wait(5)
        until(lambda: not any(alive(pid) for pid in children.values()), 15)
        assert not (server.run / "result.json").exists()
        assert server.start().wait(120) == ExitCode.COMPLETED, explained(server, folder)
        assert "goes on after round 2 of 5" in server.said
        assert server.closed == [1, 2, 3, 4, 5]
        assert_same_bits(model_of(server.run), fedavg_by_hand([NumpyHospital(h.name) for h in hospitals], 5))


@pytest.mark.faults
def test_superlink_front_and_server_process_are_revived(tmp_path):
    with federation(tmp_path, seconds=1.0, federation={"rounds": 6}) as (folder, server, _):
        server.start()
        for number, name in enumerate(("superlink", "front", "server process"), start=1):
            until(lambda n=number: n in server.closed, 90, what=explained(server, folder))
            until(lambda n=name: n in server.children(), 10)
            time.sleep(0.3)
            os.kill(server.children()[name], signal.SIGKILL)
        assert server.wait(150) == ExitCode.COMPLETED, explained(server, folder)
        assert server.closed == [1, 2, 3, 4, 5, 6]
        assert "the SuperLink had ended" in server.said
        assert "the open path had ended" in server.said
        assert "it goes on with a new one" in server.said


@pytest.mark.faults
def test_a_server_process_that_keeps_dying_is_given_up(tmp_path):
    with federation(tmp_path, names=(), runtime={"expected-hospitals": 1}) as (folder, server, _):
        server.start()
        for _ in range(3):
            until(lambda: alive(server_process(folder)), 40)
            time.sleep(0.5)
            os.kill(server_process(folder), signal.SIGKILL)
            time.sleep(0.5)
        assert server.wait(60) != 0
        assert "died 3 times without closing a round" in server.said


def server_process(folder):
    """From the processes of this machine: server.json is written every 5 s only."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
            if b"server.deployment.server_process" in words and str(folder.path).encode() in words:
                return int(pid)
    return 0


@pytest.mark.faults
def test_a_hospital_that_is_killed_and_back_at_once_holds_up_nobody(tmp_path):
    with federation(tmp_path, seconds=3.0, federation={"rounds": 3}, server={"quorum": 1}) as parts:
        folder, server, (a, b) = parts
        server.start()
        until(lambda: 1 in server.closed, 60, what=explained(server, folder))
        until(lambda: sum(kind == "train" for _, kind, _ in a.received) == 2, 30)
        a.stop(kill=True)
        killed = time.monotonic()
        while server.process.poll() is None and time.monotonic() - killed < 150:
            if not a.supernode.is_running:  # Flower refuses it until its old session has expired
                a.stop()
                a.start(seconds=0.1)
            time.sleep(1.0)
        assert server.wait(60) == ExitCode.COMPLETED, explained(server, folder)
        lines = [line for line in server.metrics() if line.get("hospital") == "a"]
        assert [line["outcome"] for line in lines] == ["aggregated", "failed", "aggregated"]
        closed = {line["round"]: line["closed"] for line in server.metrics() if "closed" in line}
        assert closed[2] - closed[1] < 100  # far below the deadline


@pytest.mark.faults
def test_ctrl_c_stops_after_the_round_and_resume_goes_on(tmp_path):
    with federation(tmp_path, seconds=0.7, federation={"rounds": 4}) as (folder, server, hospitals):
        server.start()
        until(lambda: 1 in server.closed, 60, what=explained(server, folder))
        server.signal(signal.SIGINT)
        assert server.wait(30) == ExitCode.STOPPED, explained(server, folder)
        done = server.closed
        assert server.result()["status"] == "stopped"
        assert server.start().wait(20) != 0
        assert "flower-server resume" in server.said
        revoke(folder.roster, "b")
        server.start("resume=True")
        until(lambda: "b may no longer connect" in server.said, 30)
        until(lambda: server.said.count("hospitals may connect") == 2, 30)  # from here on the run goes on
        server.signal(signal.SIGTERM)
        assert server.wait(20) == ExitCode.STOPPED
        assert server.closed == done
        assert not (server.run / "result.json").exists()


def test_two_servers_do_not_work_in_one_folder(tmp_path):
    folder = make_folder(tmp_path / "operator")
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    command = [sys.executable, "-c", holder, str(folder.lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(FederationError, match="another flower-server works"):
            start(folder)
        other.communicate(b"\n")


@pytest.mark.faults
def test_a_setting_that_cannot_be_used_ends_the_server_with_its_words(tmp_path):
    with federation(tmp_path, names=(), runtime={"initial-weights": "/no/such/file"}) as (folder, server, _):
        assert server.start().wait(60) != 0
        assert "not a readable safetensors file" in server.said, explained(server, folder)
        assert "died" not in server.said
