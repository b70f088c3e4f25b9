"""`flower-server start`: SuperLink, front and server process kept going until the run has ended.

Killed at any moment, all of them end with it, and the next start goes on at the round that was open.
"""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from typing import Self

import httpx

from common.child_process import ChildProcess
from common.errors import ConfigError, FederationError
from common.exit_codes import ExitCode, exit_code_of
from common.files import write_bytes_atomically, write_json_atomically
from common.flower_programs import flower_environment, python_module
from common.health import HealthServer
from common.node_keys import refuse_readable_by_others
from server.deployment.bell import Bell
from server.deployment.children import Kept, front_answers, start_front, start_superlink, superlink_answers
from server.deployment.control import Control
from server.deployment.endings import LAST_ERROR, Ending
from server.deployment.news import NEWS
from server.deployment.run_choice import forget_result, status_of, take_run
from server.deployment.signals import Signals
from server.deployment.told import RoundLines
from server.provisioning.operator_config import OperatorConfig, OperatorFolder
from server.provisioning.roster import read_roster
from server.run_folder import STOP

_TICK_S, _LOOK_S, _ROSTER_S = 0.2, 5.0, 1.0
_SUBMIT_S = 120.0
_DEATHS_WITHOUT_PROGRESS = 3
_SERVICES = ("superlink", "front", "run")


def start(folder: OperatorFolder, *, new: bool = False, resume: bool = False) -> ExitCode:
    """Serve the hospitals until the run has ended; how it ended. Raises FederationError, ConfigError."""
    config = folder.config()
    for secret in (folder.server_key, folder.superexec_secret):
        refuse_readable_by_others(secret)
    read_roster(folder.roster)
    with _only_one(folder), Signals() as signals, Supervisor(folder, config, signals) as supervisor:
        return supervisor.serve(new=new, resume=resume)


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
        self._online: dict[str, bool] = {}
        self._names: dict[str, str] = {}
        self._roster_tone = -1
        self._next_look = self._next_roster = 0.0
        self._since = time.time()

    def __enter__(self) -> Self:
        self._health.start()
        for service in _SERVICES:
            self._health.set(service, serving=False)
        return self

    def __exit__(self, *_: object) -> None:
        for child in (self._server, *(kept.process for kept in (self._front, self._superlink) if kept)):
            if child is not None:
                child.stop(patience_s=5.0)
        self._control.__exit__(None, None, None)
        self._health.stop()
        self._write_state("ended")

    def serve(self, *, new: bool, resume: bool) -> ExitCode:
        """Open the federation, then follow the run until it has ended."""
        folder, config = self._folder, self._config
        self._run = take_run(folder, config, new=new, resume=resume)
        self._rounds = RoundLines(self._run, rounds=config.federation.rounds)
        write_bytes_atomically(folder.state / NEWS, b"")
        self._superlink = start_superlink(folder, config, stop=lambda: self._signals.at_once)
        if self._signals.at_once:
            return ExitCode.STOPPED
        self._enforce_roster()
        if stale := self._control.stop_stale_runs():
            say(f"ended {stale} task(s) of an earlier session")
        self._front = start_front(folder, config, stop=lambda: self._signals.at_once)
        done = self._rounds.closed
        where = f"goes on after round {done} of {config.federation.rounds}" if done else "begins"
        say(f"hospitals may connect to {config.network.address}; the run {self._run.name} {where}")
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
                    why=f"its last status is {status}",
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
        environment = flower_environment(self._folder.flower_home)
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
            self._roster_tone = -1
        if front is not None and front.revive():
            say("the open path had ended and is started again")
        if now >= self._next_roster:
            self._next_roster = now + _ROSTER_S
            self._enforce_roster()
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._look()

    def _enforce_roster(self) -> None:
        """Register and unregister hospitals when roster.json has changed."""
        tone = Bell(self._folder.roster).tone
        if tone == self._roster_tone:
            return
        try:
            for line in self._control.enforce(read_roster(self._folder.roster)):
                say(line)
        except httpx.HTTPError:  # the SuperLink is on its way back
            return
        except ConfigError as error:
            say(f"the roster is left as it was: {error.what}")
        self._roster_tone = tone

    def _look(self) -> None:
        """Say who came and who went; answer for our health."""
        try:
            online = self._control.online()
        except httpx.HTTPError:
            online = {}
        with contextlib.suppress(ConfigError):  # told where the roster is enforced
            self._names = {entry.fingerprint: entry.name for entry in read_roster(self._folder.roster)}
        for fingerprint, is_here in online.items():
            if is_here != self._online.get(fingerprint, False):
                name = self._names.get(fingerprint, fingerprint)
                say(f"{name} is {'connected' if is_here else 'not connected'}")
        self._online = online or self._online
        works = {
            "superlink": bool(online) or superlink_answers(self._folder, self._config),
            "front": self._front is not None and front_answers(self._folder, self._config),
            "run": self._server is not None and self._server.is_running,
        }
        for service, serving in works.items():
            self._health.set(service, serving=serving)
        self._health.set("", serving=all(works.values()))
        self._write_state("running")

    def _write_state(self, state: str) -> None:
        """state/server.json: what runs here, for `flower-server status` and for people."""
        children = [*(k.process for k in (self._superlink, self._front) if k), *filter(None, [self._server])]
        content = {
            "state": state,
            "pid": os.getpid(),
            "since": self._since,
            "updated": time.time(),
            "run": getattr(self, "_run", self._folder.runs).name,
            "round": self._rounds.closed if hasattr(self, "_rounds") else 0,
            "processes": {c.name: c.pid for c in children if c.is_running},
            "online": sorted(fingerprint for fingerprint, is_here in self._online.items() if is_here),
        }
        with contextlib.suppress(OSError):
            write_json_atomically(self._folder.server_json, content)

    def _what_it_said(self, status: int) -> FederationError:
        kind = ConfigError if status == Ending.BAD_CONFIGURATION else FederationError
        with contextlib.suppress(OSError):
            what, *rest = (self._folder.state / LAST_ERROR).read_text().splitlines()
            return kind(what, why="\n".join(rest[:-1]), fix=rest[-1] if rest else "")
        last = "; ".join(self._server.last_lines(3)) if self._server else ""
        return kind(
            "the server process gave up", why=last[-300:], fix=f"look at {self._folder.federation_log}"
        )


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
    from pathlib import Path

    sys.exit(start(OperatorFolder(Path(sys.argv[1]))))
