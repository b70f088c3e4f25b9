"""How far a run is, read bit by bit from its folder."""

import json
import os
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import FederationError
from server.reporting.round_lines import ClosedRound, Reply, closed_round_of, metric_line, number, reply_of
from server.reporting.run_record import CONFIG, EVALUATION, METRICS, hospital_settings, read_config

_RECENT_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Score:
    """The simulation's own score of one round's model."""

    round_number: int
    split: str
    auc: float | None


@dataclass(frozen=True, kw_only=True)
class HospitalRow:
    """One hospital as the table shows it."""

    name: str
    enrolled_patients: int | None
    state: str
    """`trained in round 3`, `refused (budget-spent)`, `waiting`."""
    epsilon: float | None
    budget: float | None
    training_s: float | None


class Tail:
    """The new whole lines of a file that another process appends to, and rarely replaces."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position, self._inode, self._rest = 0, 0, b""

    def read(self) -> tuple[list[str], bool]:
        """New lines, and whether the file was replaced, so that they are all its lines again."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                replaced = self._inode not in (0, status.st_ino) or status.st_size < self._position
                if replaced:
                    self._position, self._rest = 0, b""
                self._inode = status.st_ino
                if status.st_size == self._position:
                    return [], replaced
                file.seek(self._position)
                content = file.read()
        except FileNotFoundError:
            return [], False
        self._position += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        return [line.decode(errors="replace") for line in lines], replaced


class Progress:
    """What is known of a run; `read` brings it up to date at the cost of what is new."""

    def __init__(self, run_folder: Path, *, total_rounds: int) -> None:
        self.total_rounds = total_rounds
        self.private = True
        self.newest_score: Score | None = None
        self._folder = run_folder
        self._tail = Tail(run_folder / METRICS)
        self._configured = False
        self._newest_close = 0.0
        self._evaluation_stamp: tuple[int, int] | None = None
        self._roster: list[str] = []
        self._settings: dict[str, tuple[int | None, float | None]] = {}
        """Of the hospitals that somebody has looked at."""
        self._forget_rounds()

    def read(self) -> list[ClosedRound]:
        """Take in what was written since; gives the rounds that closed meanwhile."""
        self._read_config()
        self._read_score()
        lines, replaced = self._tail.read()
        if replaced:
            self._forget_rounds()
        known = self._newest_close
        closed = [new for text in lines if (new := self._take(text)) is not None]
        self._newest_close = max([known, *(new.closed for new in closed)])
        # A replaced file repeats old rounds: they are no news.
        return [new for new in closed if new.closed > known]

    @property
    def rounds_done(self) -> int:
        """Number of the last closed round."""
        return self._recent[-1].round_number if self._recent else 0

    @property
    def epsilon(self) -> float | None:
        """Largest epsilon spent."""
        return max((spent for spent in self._epsilon.values()), default=None)

    @property
    def seconds_per_round(self) -> float | None:
        """Mean over the last rounds, from close to close; of the only round from its first message."""
        if len(self._recent) < 2:
            return self.seconds_of(self._recent[-1]) if self._recent else None
        first, last = self._recent[0], self._recent[-1]
        rounds = last.round_number - first.round_number
        return (last.closed - first.closed) / rounds if rounds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Estimate for the remaining rounds; None before the first one closed."""
        pace = self.seconds_per_round
        return None if pace is None else pace * max(0, self.total_rounds - self.rounds_done)

    def seconds_of(self, closed: ClosedRound) -> float | None:
        """Seconds from the first message of a recent round to its close."""
        sent = self._sent.get(closed.round_number)
        return None if sent is None else max(0.0, closed.closed - sent)

    def asked(self, closed: ClosedRound) -> int:
        """Hospitals that were asked in a recent round."""
        return len(self._asked.get(closed.round_number, ()))

    @property
    def num_hospitals(self) -> int:
        """Hospitals on the roster, and whoever else answered."""
        return len(self._names())

    def rows(self, most: int | None = None) -> list[HospitalRow]:
        """The hospitals in roster order, then whoever else answered; the first `most` of them."""
        return [self._row(name) for name in self._names()[:most]]

    def states(self) -> dict[str, int]:
        """How many hospitals are in each state: `{"trained in 3": 997, "waiting": 3}`."""
        counts = Counter(_state(reply) for reply in self._last.values())
        waiting = self.num_hospitals - len(self._last)
        return dict(counts.most_common()) | ({"waiting": waiting} if waiting else {})

    def _names(self) -> list[str]:
        return list(dict.fromkeys([*self._roster, *self._last]))

    def _row(self, name: str) -> HospitalRow:
        if self._configured and name not in self._settings:
            self._settings[name] = hospital_settings(self._folder, name)
        enrolled, budget = self._settings.get(name, (None, None))
        last = self._last.get(name)
        return HospitalRow(
            name=name,
            enrolled_patients=enrolled,
            state="waiting" if last is None else _state(last),
            epsilon=self._epsilon.get(name),
            budget=budget,
            training_s=self._training_s.get(name),
        )

    def _forget_rounds(self) -> None:
        self._recent: deque[ClosedRound] = deque(maxlen=_RECENT_ROUNDS)
        self._last: dict[str, Reply] = {}
        self._epsilon: dict[str, float] = {}
        self._training_s: dict[str, float] = {}
        self._sent: dict[int, float] = {}
        self._asked: dict[int, set[str]] = {}

    def _take(self, text: str) -> ClosedRound | None:
        line = metric_line(text)
        if line is None:
            return None
        if "hospital" in line:
            self._take_reply(reply_of(line))
            return None
        closed = closed_round_of(line)
        self._recent.append(closed)
        for old in [n for n in self._sent if n < closed.round_number - _RECENT_ROUNDS]:
            del self._sent[old], self._asked[old]
        return closed

    def _take_reply(self, reply: Reply) -> None:
        self._last[reply.hospital] = reply
        self._asked.setdefault(reply.round_number, set()).add(reply.hospital)
        if reply.sent is not None:
            first = self._sent.get(reply.round_number, reply.sent)
            self._sent[reply.round_number] = min(first, reply.sent)
        if reply.epsilon is not None:
            self._epsilon[reply.hospital] = reply.epsilon
        if reply.training_s is not None:
            self._training_s[reply.hospital] = reply.training_s

    def _read_config(self) -> None:
        if self._configured:
            return
        try:
            config = read_config(self._folder / CONFIG)
            roster = json.loads((self._folder / "hospitals" / "roster.json").read_text())["hospitals"]
        except (OSError, ValueError, KeyError, FederationError):
            return
        if config is not None:
            self.private = config.claims_privacy
            self._roster = [str(name) for name in roster]
            self._configured = True

    def _read_score(self) -> None:
        path = self._folder / EVALUATION
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
            if stamp == self._evaluation_stamp:
                return
            points = json.loads(path.read_text()).get("per_round") or []
        except (OSError, ValueError):
            return
        self._evaluation_stamp = stamp
        newest = max(
            (point for point in points if _is_test(point)), key=lambda p: int(p["round"]), default=None
        )
        if newest is not None:
            self.newest_score = Score(
                round_number=int(newest["round"]),
                split=str(newest.get("split", "test")),
                auc=number(newest.get("auc")),
            )


def _is_test(point: Mapping[str, Any]) -> bool:
    return isinstance(point.get("round"), int) and point.get("split", "test") == "test"


def _state(reply: Reply) -> str:
    if reply.outcome == "aggregated":
        return f"trained in {reply.round_number}"
    return f"{reply.outcome} ({reply.code})" if reply.code else reply.outcome
