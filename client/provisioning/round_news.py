"""What the rounds have come to, for the person at the hospital: a line per answer, refusals in words."""

import time
from pathlib import Path

from client.deployment.work import Work
from client.hospital_log import FILE, Entry, last_entry
from common import messages
from common.errors import RefusalCode

_SAY_AGAIN_S = 600.0
"""The same refusal, round after round, is not told more often."""
_MAY_NAME_FILES = frozenset({RefusalCode.DATA.value, RefusalCode.INTERNAL.value})
_TRACEBACK = "Traceback (most recent call last):"


class RoundNews:
    """Compares what the worker says of itself, and the hospital's own log, with what was told before."""

    def __init__(self, state: Path, *, epsilon_limit: float) -> None:
        self._log, self._limit = state / FILE, epsilon_limit
        self._stamp, self._entry = _stamp(self._log), last_entry(self._log)
        self._ended: float | None = None
        self._last_evaluated: float | None = None
        self._told: dict[tuple[str, str], float] = {}

    def of(self, work: Work) -> str:
        """What is new since the last call: some lines, or nothing."""
        return "\n".join(
            line for line in (self._answered(work), self._evaluated(work), self._refused()) if line
        )

    def _answered(self, work: Work) -> str:
        if work.last_ended is None or work.last_ended == self._ended:
            return ""
        self._ended = work.last_ended
        if work.last_type != messages.TRAIN or work.last_refusal or work.last_round is None:
            return ""
        cost = "no privacy is claimed for it"
        if work.epsilon is not None:
            cost = f"epsilon {work.epsilon:.4g} in this run so far (budget over all runs {self._limit:g})"
        return f"round {work.last_round} answered, {cost}"

    def _evaluated(self, work: Work) -> str:
        if work.last_evaluated is None or work.last_evaluated == self._last_evaluated:
            return ""
        self._last_evaluated = work.last_evaluated
        cost = "no privacy is claimed for them"
        if work.evaluation_epsilon is not None:
            cost = f"epsilon {work.evaluation_epsilon:.4g} for them by this run's evaluations so far"
        return f"counts about validation patients answered, {cost}"

    def _refused(self) -> str:
        stamp = _stamp(self._log)
        if stamp == self._stamp:
            return ""
        entry = last_entry(self._log)
        is_new, self._stamp, self._entry = entry != self._entry, stamp, entry
        if entry is None or not is_new:
            return ""
        return self._in_words(entry)

    def _in_words(self, entry: Entry) -> str:
        """The three lines; words that may name a patient's file stay in the hospital's own log."""
        now, key = time.monotonic(), (entry.code, entry.text)
        self._told = {told: at for told, at in self._told.items() if now - at < _SAY_AGAIN_S}
        if key in self._told:
            return ""
        self._told[key] = now
        lines = entry.text.split("\n")
        if _TRACEBACK in entry.text or entry.code in _MAY_NAME_FILES and not _is_about_memory(entry):
            return f"refused ({entry.code}): the words may name files and stand in {self._log} only"
        return "\n".join([f"refused ({entry.code}): {lines[0]}", *lines[1:3]])


def _is_about_memory(entry: Entry) -> bool:
    return "training.physical-batch-size" in entry.text


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
