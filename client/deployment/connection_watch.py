"""What an answer of the server means for the SuperNode: start it, leave it, or start it anew.

A SuperNode can live and do nothing: one unexpected answer ends its loop while its process stays. So its
process id says little, and the server is asked instead whether it takes this hospital for connected.
Asking a server at which the hospital is online changes nothing there.
"""

from dataclasses import dataclass
from enum import Enum

from client.server_answer import Answer, ServerState

ASK_S = 10.0
"""Between two questions while all is well."""
STARTS_WITHIN_S = 30.0
"""A SuperNode that has not been let in by then is looked at like any other."""
_DOUBT_S, _MENDS_WITHIN_S = 2.0, 30.0
"""Offline for so long means restart: without any trouble of the network before, and after some.

After a cut Flower's heartbeat comes back by itself within 20 s, with the work in hand.
"""
_OLD_SESSION_S = 75.0
"""A session that nobody ended expires 60 s after its last heartbeat; with a margin."""
_RETRY_S = (1.0, 2.0, 3.0, 5.0, 10.0)
_SAY_AGAIN_S = 600.0


class Action(Enum):
    """What to do with the SuperNode."""

    NOTHING = "nothing"
    START = "start"
    RESTART = "restart"
    GIVE_UP = "give up"
    """The first answer ever shows what only a person can mend."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What follows from an answer."""

    action: Action
    ask_again_s: float
    line: str = ""
    """News for the person, three lines at most; empty when nothing has changed."""


class ConnectionWatch:
    """Remembers as much of earlier answers as it takes; times are `time.monotonic` seconds."""

    def __init__(self) -> None:
        self.is_connected = False
        self.was_connected = False
        self.last_fault = ""
        """The last line about a fault; empty while connected."""
        self._trouble = False
        self._offline_since: float | None = None
        self._old_session_since: float | None = None
        self._failures = 0
        self._said: tuple[str, float] = ("", 0.0)

    def started(self) -> None:
        """A SuperNode was started; nothing is known of it yet."""
        self.is_connected = False
        self._trouble, self._offline_since, self._old_session_since = False, None, None

    def ended(self) -> None:
        """The SuperNode has ended or was stopped."""
        self.is_connected, self._offline_since = False, None

    def step(
        self,
        answer: Answer,
        *,
        now: float,
        running_s: float | None,
        was_let_in: bool = False,
        gave_up: bool = False,
    ) -> Step:
        """What to do; `running_s` is the age of the running SuperNode, None when there is none.

        `was_let_in`: it has said that the server opened a session for it; `gave_up`: that it tries no more.
        """
        if answer.state is ServerState.ONLINE:
            return self._online(answer, now, running_s)
        self._old_session_since = None
        if answer.state is ServerState.READY:
            self._failures = 0
            return self._ready(now, running_s, was_let_in=was_let_in, mends=self._trouble and not gave_up)
        self._trouble, self._offline_since = True, None
        if not answer.is_enrolled:
            self.is_connected = False
        if answer.needs_a_person and not self.was_connected and running_s is None:
            return Step(action=Action.GIVE_UP, ask_again_s=0.0, line=answer.text())
        pause = _RETRY_S[min(self._failures, len(_RETRY_S) - 1)]
        self._failures += 1
        return Step(
            action=Action.NOTHING,
            ask_again_s=pause,
            line=self._news(answer.text(was_connected=self.was_connected), now),
        )

    def _online(self, answer: Answer, now: float, running_s: float | None) -> Step:
        self._failures, self._offline_since = 0, None
        if running_s is not None:
            self._trouble = False
            line = "" if self.is_connected else f"connected: {_in_words(answer)}"
            self.is_connected = self.was_connected = True
            self.last_fault = ""
            if line:
                self._said = ("", now)
            return Step(action=Action.NOTHING, ask_again_s=ASK_S, line=line)
        if self._old_session_since is None:
            self._old_session_since = now
        waited = now - self._old_session_since
        if waited < _OLD_SESSION_S:
            left, longest = f"{_OLD_SESSION_S - waited:.0f} s at most", f"{_OLD_SESSION_S:.0f} s"
            text = (
                f"waiting for the old session to expire ({left})\n"
                f"a client that ends without saying so stays online at the server for up to {longest}\n"
                "nothing is to be done"
            )
        else:
            text = (
                "this hospital is already connected from elsewhere\n"
                f"its key has been in use at another place for {waited:.0f} s\n"
                "end the other client; if there is none, the key was copied: flower-client renew-key, "
                "and tell the operator"
            )
        return Step(action=Action.NOTHING, ask_again_s=3.0, line=self._news(text, now, key=text[:30]))

    def _ready(self, now: float, running_s: float | None, *, was_let_in: bool, mends: bool) -> Step:
        if running_s is None:
            return Step(action=Action.START, ask_again_s=ASK_S)
        if not was_let_in and running_s < STARTS_WITHIN_S:
            return Step(action=Action.NOTHING, ask_again_s=_DOUBT_S)
        if self._offline_since is None:
            self._offline_since = now
        self.is_connected = False
        if now - self._offline_since < (_MENDS_WITHIN_S if mends else _DOUBT_S):
            return Step(action=Action.NOTHING, ask_again_s=_DOUBT_S)
        line = "the server takes this hospital for offline although its SuperNode runs: starting it anew"
        return Step(action=Action.RESTART, ask_again_s=ASK_S, line=line)

    def _news(self, text: str, now: float, *, key: str = "") -> str:
        self.last_fault = text
        said, at = self._said
        if said == (key or text) and now - at < _SAY_AGAIN_S:
            return ""
        self._said = (key or text, now)
        return text


def _in_words(answer: Answer) -> str:
    """What the server says of itself."""
    release = (
        f"release {answer.server_release}" if answer.server_release else "a server that names no release"
    )
    days = answer.certificate_days_left
    return release + (f", certificate valid for {days:.0f} days" if days is not None else "")
