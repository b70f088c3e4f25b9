"""A hospital's client: starts SuperNode and worker, watches what they achieve, replaces what fails.

Everything that is started here ends with this process, however it ends.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from client.deployment.hospital_folder import HospitalFolder, cannot_write
from client.deployment.key_on_disk import KeyOnDisk
from client.deployment.session import Session
from client.deployment.status import StatusFile, status_of
from client.deployment.supernode import refuse_taken_port
from client.deployment.worker import WorkerProcess
from client.provisioning.round_news import RoundNews
from client.provisioning.standing import has_left, is_paused
from client.site_lock import CLIENT_LOCK, site_lock
from common.enrolment import Enrolment
from common.errors import FederationError, LedgerError
from common.exit_codes import ExitCode
from common.health import HealthServer

_LOOK_S = 0.2


def start(folder: Path) -> ExitCode:
    """Run the hospital in `folder` until SIGTERM, SIGINT, or until it has left the federation.

    Raises FederationError (ConfigError for what is wrong here) when it cannot begin.
    """
    hospital = HospitalFolder(folder)
    enrolment = hospital.enrolment()
    key = hospital.key(enrolment)
    if has_left(hospital.state):
        raise FederationError(
            f"{hospital.config.hospital.name} has left {enrolment.federation}",
            why="flower-client leave was called here",
            fix="to take part again: flower-client leave --off",
        )
    os.umask(0o077)  # also for what Flower's programs write here
    with _alone(hospital):
        _apply_retention(hospital)
        refuse_taken_port(hospital.config.connection.runtime_port, key="runtime-port")
        hospital.prepare(enrolment, key)
        try:
            with _stop_on_signals() as stop:
                return Supervisor(hospital, enrolment, key).run(stop)
        finally:
            hospital.tidy()


class Supervisor:
    """Holds the session with the server and the worker."""

    def __init__(self, folder: HospitalFolder, enrolment: Enrolment, key: ec.EllipticCurvePrivateKey) -> None:
        self._folder, self._enrolment = folder, enrolment
        self._worker = WorkerProcess(folder)
        self._session = Session(folder, enrolment, key, say=say)
        self._key = KeyOnDisk(folder, enrolment)
        self._news = RoundNews(folder.state, epsilon_limit=folder.config.policy.epsilon)
        self._health = HealthServer(folder.config.connection.health_port)
        self._status = StatusFile(folder.status_file)

    def run(self, stop: threading.Event) -> ExitCode:
        """Watch until `stop` is set or the hospital has left."""
        try:
            self._health.start()
            say(f"{self._folder.config.hospital.name} joins {self._enrolment.federation}")
            while not stop.wait(_LOOK_S):
                # 1. Has the hospital left?
                if has_left(self._folder.state):
                    say("this hospital has left the federation")
                    break
                # 2. Does the server take us for connected? Where it does not know us, nothing more is loaded.
                self._session.look(worker_is_idle=self._worker.is_idle)
                # 3. Is there a worker that gets on? One that dropped a task leaves a SuperNode waiting.
                if self._session.has_asked:
                    self._look_at_worker()
                # 4. Say how it is.
                if news := self._key.news():
                    say(news)
                self._publish()
        finally:
            self._session.end()
            self._worker.stop()
            self._publish()
            self._health.stop()
        say("ended")
        return ExitCode.COMPLETED

    def _look_at_worker(self) -> None:
        news = self._worker.look() if self._worker.was_started else self._worker.start()
        if news.line:
            say(news.line)
        if news.lost_a_task:
            self._session.restart()
        if line := self._news.of(self._worker.work):
            say(line)

    def _publish(self) -> None:
        connected, works = self._session.connected_since is not None, self._worker.is_ready
        self._health.set("connection", serving=connected)
        self._health.set("worker", serving=works)
        self._health.set("", serving=connected and works)
        with suppress(OSError):  # a full disk is no reason to end
            self._status.write(
                status_of(
                    hospital=self._folder.config.hospital.name,
                    federation=self._enrolment.federation,
                    address=self._enrolment.address,
                    connected_since=self._session.connected_since,
                    last_connected=self._session.last_connected,
                    standing="paused" if is_paused(self._folder.state) else "takes part",
                    fault=self._session.fault,
                    work=self._worker.work,
                    epsilon_limit=self._folder.config.policy.epsilon,
                )
            )


@contextmanager
def _alone(hospital: HospitalFolder) -> Iterator[None]:
    lock = site_lock(hospital.state, timeout_s=0.5, name=CLIENT_LOCK)
    try:
        lock.__enter__()
    except OSError as error:
        raise cannot_write(error, hospital.state) from error
    except LedgerError:
        raise FederationError(
            f"flower-client is already running for {hospital.path}",
            why="two clients with one key would take each other's session",
            fix="flower-client status shows it; end it first",
        ) from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _apply_retention(hospital: HospitalFolder) -> None:
    from client.retention import purge_at_start

    if gone := purge_at_start(hospital.kept, hospital.config.retention):
        megabytes = sum(removal.num_bytes for removal in gone) / 1e6
        say(f"removed what [retention] does not keep: {len(gone)} file(s) and folder(s), {megabytes:.1f} MB")


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str) -> None:
    """One event for the person, with the time."""
    with suppress(OSError):  # a full disk behind it is no reason to end
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", flush=True)
