"""How the server process ends, for the supervisor that started it."""

from enum import IntEnum

LAST_ERROR = "last-error"
"""In the state folder: the text for the person when the process gave up."""


class Ending(IntEnum):
    """Exit status; anything else is a death that a new process may survive."""

    DONE = 0
    BAD_CONFIGURATION = 2
    GAVE_UP = 64
    """An error of ours: trying again would meet it again. Python's own status 1 must not look like it."""
    CRASHED = 70
    """An error that nobody has foreseen: a death like any other."""
    TRY_AGAIN = 75
    """Flower's run is gone (the SuperLink was away for too long)."""
