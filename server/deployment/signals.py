"""How a person, or the machine, asks the server to end."""

import signal
import threading
from types import FrameType
from typing import Self


class Signals:
    """Ctrl-C: once stops the run in order, twice ends at once. SIGTERM: at once; the next start goes on."""

    def __init__(self) -> None:
        self.interrupts, self.ended = 0, False

    @property
    def at_once(self) -> bool:
        """Whether to end without waiting for the round."""
        return self.ended or self.interrupts > 1

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._take) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.ended = True
        else:
            self.interrupts += 1
