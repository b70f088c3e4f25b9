"""What a command that runs a federation answers to the shell."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a run ended."""

    COMPLETED = 0
    FAILED = 1
    BAD_CONFIGURATION = 2
    STOPPED = 3
    QUORUM_LOST = 4
    BUDGET_EXHAUSTED = 5


_BY_STATUS = {
    "completed": ExitCode.COMPLETED,
    "stopped": ExitCode.STOPPED,
    "quorum-lost": ExitCode.QUORUM_LOST,
    "budget-exhausted": ExitCode.BUDGET_EXHAUSTED,
}


def exit_code_of(status: str) -> ExitCode:
    """The code for `status` of result.json; anything unknown has failed."""
    return _BY_STATUS.get(status, ExitCode.FAILED)
