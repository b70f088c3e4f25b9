"""`flower-server start`: SuperLink, front and server process kept going until the run has ended.

Killed at any moment, all of them end with it, and the next start goes on at the round that was open.
"""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Self

import httpx

from common.child_process import ChildProcess
from common.errors import ConfigError, FederationError
from common.exit_codes import ExitCode, exit_code_of
from common.files import write_bytes_atomically, write_json_atomically
from common.flower_programs import python_module
from common.health import HealthServer
from common.node_keys import refuse_readable_by_others
from server.deployment.attendance import Attendance
from server.deployment.children import Kept, start_front, start_superlink
from server.deployment.control import Control
from server.deployment.endings import LAST_ERROR, Ending
from server.deployment.lean_environment import lean_environment
from server.deployment.news import NEWS
from server.deployment.probes import Answer, front_answer, superlink_answer
from server.deployment.run_choice import choose_folder, forget_result, status_of, take_run
from server.deployment.signals import Signals
from server.deployment.told import CertificateLines, RoundLines
from server.provisioning.certificate_checks import refuse_unusable_certificate
from server.provisioning.operator_config import OperatorConfig, OperatorFolder
from server.provisioning.presence import SERVICES
from server.provisioning.roster import read_roster
from server.run_folder import STOP

_TICK_S, _LOOK_S, _ROSTER_S = 0.2, 5.0, 1.0
_SUBMIT_S, _PROBE_S = 120.0, 5.0
_DEATHS_WITHOUT_PROGRESS = 3


def start(
    folder: OperatorFolder, *, new: bool = False, resume: bool = False, run: Path | None = None
) -> ExitCode:
    """Serve the hospitals until the run has ended; how it ended. Raises FederationError, ConfigError.

    `run` is the run to resume; without it the current one.
    """
    config = folder.config()
    for secret in (folder.server_key, folder.superexec_secret):
        refuse_readable_by_others(secret)
    read_roster(folder.roster)
    refuse_unusable_certificate(folder, config)
    with _only_one(folder), Signals() as signals, Supervisor(folder, config, signals) as supervisor:
        return supervisor.serve(choose_folder(folder, config, new=new, resume=resume, run=run), resume=resume)


def say(line: str) -> None:
    """One line for the person who watches, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


class Supervisor:
    """One session of the server; as a context manager it ends whatever it has started."""

    def __init__(self, folder: OperatorFolder, config: OperatorConfig, signals: Signals) -> None:
        self._folder, self._config, self._signals = folder, config, signals
        self._health = HealthServer(config.network.health_port)
        self._superlink: Kept | None = None
        self._front: Kept | None = None
        self._server: ChildProcess | None = None
        self._control = Control(config.network.superlink_port, authority=folder.ca_certificate.read_bytes())
        self._attendance = Attendance(folder, self._control, say)
        self._certificate = CertificateLines(folder)
        self._next_look = self._next_roster = 0.0
        self._since = time.time()

    def __enter__(self) -> Self:
        self._health.start()
        for service in SERVICES.values():
            self._health.set(service, serving=False)
        return self

    def __exit__(self, *_: object) -> None:
        for child in (self._server, *(kept.process for kept in (self._front, self._superlink) if kept)):
            if child is not None:
                child.stop(patience_s=5.0)
        self._control.__exit__(None, None, None)
        self._health.stop()
        self._write_state("ended")

    def serve(self, run: Path, *, resume: bool) -> ExitCode:
        """Open the federation, then follow the run until it has ended."""
        folder, config = self._folder, self._config
        self._run, self._rounds = run, RoundLines(run, rounds=config.federation.rounds)
        write_bytes_atomically(folder.state / NEWS, b"")
        self._superlink = start_superlink(folder, config, stop=lambda: self._signals.at_once)
        if self._signals.at_once:
            return ExitCode.STOPPED
        self._attendance.enforce()
        with contextlib.suppress(httpx.HTTPError):  # done again when the run is submitted
            if stale := self._control.stop_stale_runs():
                say(f"ended {stale} task(s) of an earlier session")
        self._front = start_front(folder, config, stop=lambda: self._signals.at_once)
        if self._signals.at_once:
            return ExitCode.STOPPED
        take_run(folder, run, resume=resume)  # until here a start that failed has changed nothing
        done = self._rounds.closed
        where = f"goes on after round {done} of {config.federation.rounds}" if done else "begins"
        say(f"hospitals may connect to {config.network.address}; the run {run.name} {where}")
        return self._follow()

    def _follow(self) -> ExitCode:
        """Keep a server process working on the run, a new one when it dies, until the run has a result."""
        deaths = 0
        while not self._signals.at_once:
            closed = self._rounds.closed
            self._submit()
            status = self._watch()
            if status is None:
                break
            if status == Ending.DONE and (ended := status_of(self._run)) is not None:
                say(f"the run {self._run.name} is {ended}")
                return exit_code_of(ended)
            if status in (Ending.GAVE_UP, Ending.BAD_CONFIGURATION):
                raise self._what_it_said(status)
            deaths = 1 if self._rounds.closed > closed else deaths + 1
            if deaths >= _DEATHS_WITHOUT_PROGRESS:
                raise FederationError(
                    f"the server process died {deaths} times without closing a round",
                    why=self._last_words() or f"its last status is {status}",
                    fix=f"look at {self._folder.federation_log}, then flower-server resume",
                )
            say(f"the server process ended with status {status}; it goes on with a new one")
        say("ended at once; the next flower-server start goes on with the open round")
        return ExitCode.STOPPED

    def _submit(self) -> None:
        """Give Flower a new run, and a process that takes it."""
        forget_result(self._run)
        (self._folder.state / LAST_ERROR).unlink(missing_ok=True)
        give_up_at = time.monotonic() + _SUBMIT_S
        while not self._signals.at_once:
            self._keep_going()
            try:
                self._control.stop_stale_runs()
                self._control.start_run()
                break
            except httpx.HTTPError as error:  # the SuperLink is on its way back
                if time.monotonic() > give_up_at:
                    raise FederationError(
                        "the SuperLink takes no run",
                        why=str(error),
                        fix=f"look at {self._folder.superlink_log}",
                    ) from None
                time.sleep(_TICK_S)
        command = python_module("server.deployment.server_process", str(self._folder.path), str(self._run))
        environment = lean_environment(self._folder.flower_home)
        log = self._folder.federation_log
        self._server = ChildProcess(command, log=log, env=environment, name="server process")
        self._server.start()

    def _watch(self) -> int | None:
        """Exit status of the server process; None when a person wants to end at once."""
        server, stop = self._server, self._run / STOP
        while server is not None and not self._signals.at_once:
            status = server.poll()
            for line in self._rounds.fresh():
                say(line)
            if status is not None:
                return status
            if self._signals.interrupts and not stop.exists():
                stop.touch()
                say("stopping; an open round is asked again on resume; a second Ctrl-C ends at once")
            self._keep_going()
            time.sleep(_TICK_S)
        return None

    def _keep_going(self) -> None:
        """Revive what has died; follow the roster; look who is here."""
        superlink, front, now = self._superlink, self._front, time.monotonic()
        if superlink is not None and superlink.revive():
            say("the SuperLink had ended and is started again")
            self._attendance.enforce_anew()
        if front is not None and front.revive():
            say("the open path had ended and is started again")
        if now >= self._next_roster:
            self._next_roster = now + _ROSTER_S
            self._attendance.enforce()
        if now >= self._next_look:
            self._look()
            self._next_look = time.monotonic() + _LOOK_S

    def _look(self) -> None:
        """Say who came and who went; answer for our health; start anew who lives and does not answer."""
        folder, config = self._folder, self._config
        answers = {
            "superlink": superlink_answer(folder, config, timeout_s=_PROBE_S),
            "front": front_answer(folder, config, timeout_s=_PROBE_S),
        }
        for kept, answer in ((self._superlink, answers["superlink"]), (self._front, answers["front"])):
            if kept is not None and kept.heard(answer):
                say(f"the {kept.process.name} lived and did not answer; it is ended and started again")
        if answers["superlink"] is not Answer.NONE:
            self._attendance.look()
        for child in self._children:
            child.bound_log()
        self._certificate.tell(say)
        works = {service: answer.is_well for service, answer in answers.items()}
        works["run"] = self._server is not None and self._server.is_running
        for service, serving in works.items():
            self._health.set(service, serving=serving)
        self._health.set("", serving=all(works.values()))
        self._write_state("running")

    @property
    def _children(self) -> list[ChildProcess]:
        return [*(k.process for k in (self._superlink, self._front) if k), *filter(None, [self._server])]

    def _write_state(self, state: str) -> None:
        """state/server.json: what runs here, for `flower-server status` and for people."""
        content = {
            "state": state,
            "pid": os.getpid(),
            "since": self._since,
            "updated": time.time(),
            "run": getattr(self, "_run", self._folder.runs).name,
            "round": self._rounds.closed if hasattr(self, "_rounds") else 0,
            "processes": {c.name: c.pid for c in self._children if c.is_running},
            "online": self._attendance.online,
            "presence": {key: asdict(known) for key, known in self._attendance.presence.items()},
        }
        with contextlib.suppress(OSError):
            write_json_atomically(self._folder.server_json, content)

    def _what_it_said(self, status: int) -> FederationError:
        kind = ConfigError if status == Ending.BAD_CONFIGURATION else FederationError
        if said := self._last_words():
            what, *rest = said.splitlines()
            return kind(what, why="\n".join(rest[:-1]), fix=rest[-1] if rest else "")
        return kind("the server process gave up", fix=f"look at {self._folder.federation_log}")

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            return (self._folder.state / LAST_ERROR).read_text()
        return ""


@contextlib.contextmanager
def _only_one(folder: OperatorFolder) -> Iterator[None]:
    """Hold the folder's lock. Raises FederationError when another server works in it."""
    folder.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with folder.lock.open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FederationError(
                f"another flower-server works in {folder.path}",
                why=f"it holds {folder.lock}",
                fix="see it with flower-server status, or end it first",
            ) from None
        yield


if __name__ == "__main__":
    sys.exit(start(OperatorFolder(Path(sys.argv[1]))))
