"""The session with the server: a SuperNode that is started, watched by what it achieves, and replaced."""

import time
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric import ec

from client.deployment.connection_watch import ASK_S, STARTS_WITHIN_S, Action, ConnectionWatch
from client.deployment.hospital_folder import HospitalFolder
from client.deployment.open_session import OpenSession
from client.deployment.questions import Questions
from client.deployment.supernode import SuperNode
from common.enrolment import Enrolment
from common.errors import FederationError

_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
_STEADY_S = 60.0
"""A SuperNode that lived for so long has started well: the next pause is short again."""
_ANSWERED_WITHIN_S, _LOOK_AT_LOG_S = 60.0, 5.0
"""A message that waits in the SuperNode for so long, while the worker has nothing to do, is lost on it."""


class Session:
    """Keeps the hospital connected; every method returns soon."""

    def __init__(
        self,
        folder: HospitalFolder,
        enrolment: Enrolment,
        key: ec.EllipticCurvePrivateKey,
        *,
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._log = folder.logs / "supernode.log"
        self._supernode = SuperNode(folder, enrolment)
        self._questions = Questions(enrolment, key, https_proxy=folder.config.connection.https_proxy)
        self._watch = ConnectionWatch()
        self._open = OpenSession(folder.state / "session.json", enrolment)
        self._is_meant_to_run = self._was_let_in = False
        self._ask_at = 0.0
        self._short_lives = 0
        self._refused = ""
        self._log_at = 0.0
        self._waits_since: float | None = None
        self.has_asked = False
        """Whether the server has been asked once, with whatever result."""
        self.last_connected: float | None = None
        """Unix seconds at which the last session ended."""
        self.connected_since: float | None = None
        """Unix seconds; None while the server does not take this hospital for connected."""

    @property
    def fault(self) -> str:
        """What stands between the hospital and the server; empty while connected."""
        return self._watch.last_fault

    def look(self, *, worker_is_idle: bool = False) -> None:
        """See whether the SuperNode lives and what the server thinks; act on it.

        `worker_is_idle`: nobody works on a message that the SuperNode may have. Raises FederationError when
        the very first answer shows what only a person can mend.
        """
        now = time.monotonic()
        self._supernode.bound_log()
        if self._is_meant_to_run and not self._supernode.is_running:
            self._note_end(now)
        self._see_unanswered(now, worker_is_idle)
        if (answer := self._questions.answer()) is not None:
            age_s = now - self._supernode.started if self._is_meant_to_run else None
            step = self._watch.step(
                answer,
                now=now,
                running_s=age_s,
                was_let_in=self._was_let_in,
                gave_up=self._supernode.gave_up(),
            )
            self._ask_at = now + step.ask_again_s
            if answer.is_enrolled and not self._is_meant_to_run:
                self._open.closed()  # the server was told; never twice, it may be another's by now
            if step.action is Action.GIVE_UP:
                raise answer.as_error()
            self.has_asked = True
            if step.line:
                self._say(step.line)
            if step.action is Action.START:
                self._start()
            elif step.action is Action.RESTART:
                self.restart()
        self._ask_when_due(now)
        if self._watch.is_connected != (self.connected_since is not None):
            if self.connected_since is not None:
                self.last_connected = time.time()
            self.connected_since = time.time() if self._watch.is_connected else None

    def restart(self) -> None:
        """End this session, also at the server, and begin another: soon, or later where it repeats."""
        if self._is_meant_to_run:
            self._stop()
            self._ask_at = time.monotonic() + self._pause(time.monotonic())

    def end(self) -> None:
        """End the session at the server and the SuperNode."""
        self._stop()
        if self.connected_since is not None:
            self.last_connected = time.time()
        self.connected_since = None

    def _ask_when_due(self, now: float) -> None:
        if self._is_meant_to_run and not self._was_let_in:
            if (node_id := self._supernode.node_id()) is not None:
                self._was_let_in = True
                self._open.opened(node_id)
                self._ask_at = now  # confirm it at once
            elif now - self._supernode.started < STARTS_WITHIN_S:
                return  # a question could take the session that it is about to open
        if now >= self._ask_at and not self._questions.is_asking:
            self._ask_at = now + ASK_S
            self._questions.ask(end_first=None if self._is_meant_to_run else self._open.left_open())

    def _start(self) -> None:
        try:
            self._supernode.start()
        except (FederationError, OSError) as error:
            if not self._supernode.starts and isinstance(error, FederationError):
                raise
            before, self._refused = self._refused, f"the SuperNode cannot be started: {error}"
            if before != self._refused:  # another program was quicker, or the disk is full: it may end
                self._say(self._refused)
            return
        self._refused = ""
        self._watch.started()
        self._is_meant_to_run, self._was_let_in = True, False

    def _stop(self) -> None:
        self._is_meant_to_run = False
        if self._supernode.stop():
            self._open.closed()
        self._watch.ended()
        self._questions.forget()

    def _note_end(self, now: float) -> None:
        self._stop()
        self._ask_at = now + self._pause(now)
        self._say(f"the SuperNode has ended, see {self._log}")

    def _pause(self, now: float) -> float:
        """Before the next SuperNode; longer with every one that has not lived for a minute."""
        self._short_lives = 0 if now - self._supernode.started > _STEADY_S else self._short_lives + 1
        return _PAUSES_S[min(self._short_lives, len(_PAUSES_S) - 1)]

    def _see_unanswered(self, now: float, worker_is_idle: bool) -> None:
        if now < self._log_at:
            return
        self._log_at = now + _LOOK_AT_LOG_S
        if not (worker_is_idle and self._is_meant_to_run and self._supernode.awaits_an_answer()):
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        elif now - self._waits_since > _ANSWERED_WITHIN_S:
            self._waits_since = None
            self._say(
                f"a message waits in the SuperNode and nobody works on it: starting it anew ({self._log})"
            )
            self.restart()
