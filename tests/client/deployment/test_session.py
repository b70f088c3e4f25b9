"""One session after the other: what is said once, what is done less and less often, what is kept."""

import json
import os
import time

import pytest

from client.deployment.hospital_folder import HospitalFolder
from client.deployment.key_on_disk import KeyOnDisk
from client.deployment.open_session import OpenSession
from client.deployment.session import Session
from client.deployment.supernode import SuperNode, supernode_command
from client.provisioning.new_hospital import renew_key
from common.flower_programs import free_port
from common.node_keys import load_private_key, public_key_of
from tests.client.certificates import Authority
from tests.client.deployment.running_hospital import RunningHospital


@pytest.fixture
def folder(tmp_path):
    hospital = HospitalFolder(RunningHospital(tmp_path / "north", Authority(), free_port()).folder)
    hospital.prepare(hospital.enrolment(), hospital.key(hospital.enrolment()))
    return hospital


class FakeSuperNode:
    """Starts at once and does nothing."""

    def __init__(self):
        self.starts, self.started, self.is_running, self.awaits = 0, 0.0, False, False

    def start(self):
        self.starts, self.started, self.is_running = self.starts + 1, time.monotonic(), True

    def stop(self):
        self.is_running = False
        return True

    def bound_log(self):
        pass

    def node_id(self):
        return 7

    def gave_up(self):
        return False

    def awaits_an_answer(self):
        return self.awaits


@pytest.fixture
def session(folder, monkeypatch):
    said = []
    found = Session(folder, folder.enrolment(), folder.key(folder.enrolment()), say=said.append)
    found._supernode, found.said = FakeSuperNode(), said
    monkeypatch.setattr(found._questions, "ask", lambda **_: None)
    return found


def test_restarts_that_repeat_within_a_minute_wait_longer_and_longer(session):
    pauses = []
    for _ in range(5):
        session._start()
        session.restart()
        pauses.append(round(session._ask_at - time.monotonic()))
    assert pauses == [1, 2, 5, 10, 30]
    session._start()
    session._supernode.started -= 100
    session.restart()
    assert session._ask_at <= time.monotonic()


def test_a_message_that_nobody_works_on_starts_the_supernode_anew(session, monkeypatch):
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    session._start()
    session._supernode.awaits = True
    for idle, expected in ((False, 0), (True, 1)):
        for _ in range(20):
            clock[0] += 4
            session.look(worker_is_idle=idle)
        assert sum("nobody works on it" in line for line in session.said) == expected
        assert session._supernode.is_running is (expected == 0)


def test_a_supernode_that_cannot_be_started_is_told_once_and_tried_again(session, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(session._supernode, "start", full)
        for _ in range(3):
            session._start()
    assert len(session.said) == 1
    session._start()
    assert session._supernode.is_running


RECEIVED = b"Receiving: train message (ID: 1)\nReceived successfully\n"
SENT = b"Sending: train message (ID: 2)\nSent successfully\n"


@pytest.mark.parametrize(
    ("log", "awaits"),
    [
        (b"", False),
        (RECEIVED, True),
        (RECEIVED + b"x" * 9000, True),
        (RECEIVED + SENT, False),
        (RECEIVED + SENT + RECEIVED, True),
        (RECEIVED + SENT + RECEIVED[:30], False),
        (RECEIVED + b"Sending: train", False),
        (RECEIVED + b"Starting Flower SuperNode\n", False),
    ],
)
def test_the_log_tells_whether_a_message_waits(folder, log, awaits):
    (folder.logs / "supernode.log").write_bytes(log)
    assert SuperNode(folder, folder.enrolment()).awaits_an_answer() is awaits


def test_a_session_that_was_ended_is_not_ended_again_where_the_disk_keeps_its_file(folder, monkeypatch):
    note = OpenSession(folder.state / "session.json", folder.enrolment())
    note.opened(7)
    assert note.left_open() == 7

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", read_only)
        note.closed()
    assert json.loads((folder.state / "session.json").read_text())["node"] == "7"
    assert note.left_open() is None


def test_a_key_renewed_while_the_client_runs_is_told_once_and_the_old_one_stays_in_use(folder):
    enrolment = folder.enrolment()
    watch = KeyOnDisk(folder, enrolment)
    assert watch.news() == ""
    made, _ = renew_key(folder.path)
    news = watch.news()
    assert "not enrolled yet at test" in news
    assert made.fingerprint in news
    assert made.enroll_command(replace_key=True) in news
    assert watch.news() == ""
    command = supernode_command(folder, enrolment)
    in_use = command[command.index("--auth-supernode-private-key") + 1]
    assert public_key_of(load_private_key(folder.key_in_use)).fingerprint == enrolment.fingerprint
    assert in_use == str(folder.key_in_use)
    folder.tidy()
    assert not folder.key_in_use.exists()
