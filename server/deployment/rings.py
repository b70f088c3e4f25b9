"""Objects that refer to each other in a ring: Python frees them only when it looks for rings.

A request that has been answered is one, with the piece of a model that it brought. Python looks rarely where
a program has many objects; a thread that looks often bounds what lies about.
"""

import gc
import threading
import time

_SHORTEST_PAUSE_S, _LARGEST_SHARE = 0.25, 0.04
"""Between two looks; and how much of the time may go into looking."""
_SETTLED_S = 10.0
"""After so long the program has all that it keeps for ever."""


def look_for_rings() -> None:
    """Look from now on, in a thread. Call it when all is imported: what is there now is never looked at."""
    _leave_out()
    threading.Thread(target=_look, name="rings", daemon=True).start()


def _look() -> None:
    settles_at: float | None = time.monotonic() + _SETTLED_S
    while True:
        began = time.monotonic()
        if settles_at is not None and began > settles_at:
            settles_at = None
            _leave_out()
        gc.collect()
        time.sleep(max(_SHORTEST_PAUSE_S, (time.monotonic() - began) / _LARGEST_SHARE))


def _leave_out() -> None:
    gc.collect()
    gc.freeze()
