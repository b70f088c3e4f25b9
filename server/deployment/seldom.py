"""A log that nobody outside can fill: each kind of line once a minute, with a count of the others."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

_EVERY_S = 60.0
_MOST_KINDS = 200
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")


@dataclass(kw_only=True)
class _Kind:
    until: float
    silenced: int = 0


class Seldom(logging.Filter):
    """Lines are of one kind when they differ in numbers only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._clock = clock

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written; the next one of its kind says how many were not."""
        text = record.getMessage()
        first_line = text.partition("\n")[0][:200]
        name, now = (record.name, _VARYING.sub("#", first_line)), self._clock()
        kind = self._kinds.get(name)
        if kind is not None and now < kind.until:
            kind.silenced += 1
            return False
        if kind is not None and kind.silenced:
            record.msg, record.args = f"{text} ({kind.silenced} more like this before)", ()
        if kind is None and len(self._kinds) >= _MOST_KINDS:
            self._kinds = {n: k for n, k in self._kinds.items() if now < k.until}
            if len(self._kinds) >= _MOST_KINDS:
                return False
        self._kinds[name] = _Kind(until=now + _EVERY_S)
        return True
