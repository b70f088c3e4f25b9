"""A worker that lives and does nothing is seen in every phase, by a clock that nobody can set."""

import os
import signal
import time

import pytest

from client.deployment.hospital_folder import HospitalFolder
from client.deployment.liveness import Liveness
from client.deployment.work import Phase, Work
from client.deployment.worker import WorkerProcess
from common.flower_programs import free_port
from common.health import Health, ask_health
from tests.client.certificates import Authority
from tests.client.deployment.running_hospital import RunningHospital, is_alive, wait_for


class Watched:
    """A liveness and seconds."""

    def __init__(self):
        self.life, self.now, self.beats = Liveness(longest_task_s=100.0), 50.0, 0
        self.work = Work(pid=1)
        self.life.started(self.now)

    def at(self, phase):
        self.work = self.work.at(phase)
        self.life.see(self.work, self.beats, now=self.now)

    def later(self, seconds, *, beating=False):
        """Look once a second; gives what is wrong at the end."""
        for _ in range(int(seconds)):
            self.now += 1
            self.beats += beating
            self.life.see(self.work, self.beats, now=self.now)
        return self.life.hangs(self.now)


@pytest.fixture
def watched():
    return Watched()


def test_an_idle_worker_that_beats_is_left_alone(watched):
    watched.at(Phase.IDLE)
    assert watched.later(10_000, beating=True) == ""
    assert not watched.life.is_late(watched.now)


def test_an_idle_worker_that_is_silent_is_late_and_then_replaced(watched):
    watched.at(Phase.IDLE)
    assert watched.later(45) == ""
    assert watched.life.is_late(watched.now)
    assert watched.later(20) == "silent for 65 s"
    watched.life.started(watched.now)
    watched.at(Phase.STARTING)
    assert watched.later(600) == ""


def test_starting_for_a_quarter_of_an_hour_is_too_long(watched):
    watched.at(Phase.STARTING)
    assert watched.later(890) == ""
    assert "starting" in watched.later(20)


def test_a_task_counts_from_when_it_was_first_seen_whatever_the_clock_says(watched, monkeypatch):
    watched.at(Phase.IDLE)
    watched.later(5, beating=True)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: 5.0)  # a clock that was wrong by decades
        watched.at(Phase.BUSY)
    assert watched.later(95) == ""
    assert "at one task" in watched.later(10)
    watched.at(Phase.IDLE)
    watched.at(Phase.BUSY)
    assert watched.later(95) == "", "another task"


def test_a_disk_that_takes_nothing_excuses_silence(watched):
    watched.at(Phase.IDLE)
    assert watched.later(70)
    watched.life.excuse(watched.now)
    assert watched.later(30) == ""


@pytest.fixture
def folder(tmp_path):
    hospital = HospitalFolder(RunningHospital(tmp_path / "north", Authority(), free_port()).folder)
    hospital.prepare(hospital.enrolment(), hospital.key(hospital.enrolment()))
    return hospital


def test_a_disk_that_takes_nothing_ends_nobody(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    worker = WorkerProcess(folder)
    monkeypatch.setattr("client.deployment.worker.write_work", full)
    monkeypatch.setattr(worker._process, "start", full)
    said = [worker.start().line, worker.start().line, worker.look().line]
    assert "No space left" in said[0]
    assert said[1:] == ["", ""], "it is said once"
    assert not worker.is_ready


@pytest.mark.faults
def test_a_worker_that_stands_still_without_a_task_is_replaced(tmp_path):
    hospital = RunningHospital(tmp_path / "north", Authority(), free_port())
    hospital.start()
    try:
        wait_for(lambda: hospital.work.phase == "idle", within_s=40)
        wait_for(lambda: ask_health(hospital.health_port, "worker") is Health.SERVING, within_s=5)
        time.sleep(65)
        worker = hospital.processes()["worker"]
        assert hospital.said().count("the worker was ended") == 0, "one that beats stays"
        os.kill(worker, signal.SIGSTOP)
        wait_for(lambda: ask_health(hospital.health_port, "worker") is Health.NOT_SERVING, within_s=50)
        wait_for(lambda: not is_alive(worker), within_s=40)
        wait_for(lambda: "was ended, silent for 60 s" in hospital.said(), within_s=5)
        wait_for(lambda: ask_health(hospital.health_port, "worker") is Health.SERVING, within_s=40)
    finally:
        hospital.end()
