"""A test's instrument: the hospital's process kills itself at a named step of a round.

    HOSPITAL_FEDERATION_FAULT=charged        SIGKILL the first time that step is reached
    HOSPITAL_FEDERATION_FAULT=charged:3      the third time

Nothing happens where the variable is not set, and nothing but a line in the log where it names no step. It
can end a process, never change what a round does: that it holds wherever it is cut is what it serves to show.
"""

import logging
import os
import signal
from typing import Final

VARIABLE: Final = "HOSPITAL_FEDERATION_FAULT"
POINTS: Final = ("before-charge", "charged", "trained", "sealed-before-mark", "marked", "before-send")
"""The boundaries between the steps of `client.round`, in order."""

log = logging.getLogger(__name__)
_reached: dict[str, int] = {}


def reached(point: str) -> None:
    """Say that a round is at `point`; the process ends here if the environment asks for it."""
    named = os.environ.get(VARIABLE)
    if not named:
        return
    wanted, _, count = named.partition(":")
    if wanted not in POINTS or (count and not count.isdecimal()):
        log.warning("%s=%r names no step of a round (%s): ignored", VARIABLE, named, ", ".join(POINTS))
        return
    if wanted == point:
        _reached[point] = _reached.get(point, 0) + 1
        if _reached[point] == int(count or 1):
            log.warning("%s=%s: this process is killed", VARIABLE, named)
            os.kill(os.getpid(), signal.SIGKILL)
