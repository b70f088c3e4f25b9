"""Whether this hospital takes part: paused and left are two small files in its state folder.

The worker looks before every task, so that a pause holds from the next round on without a restart.
"""

import os
from datetime import UTC, datetime
from pathlib import Path

from common.errors import printable

PAUSED, LEFT = "paused", "left"


def is_paused(state: Path) -> bool:
    """Whether rounds are refused for now."""
    return _is_there(state / PAUSED)


def has_left(state: Path) -> bool:
    """Whether the hospital has left the federation; `flower-client leave --off` undoes it."""
    return _is_there(state / LEFT)


def pause(state: Path) -> bool:
    """Refuse rounds from the next one on; False when it was paused already."""
    return _put(state / PAUSED)


def unpause(state: Path) -> bool:
    """Take part again; False when it was not paused."""
    return _take(state / PAUSED)


def leave(state: Path) -> bool:
    """Leave: rounds are refused, a running client ends; False when it had left already."""
    return _put(state / LEFT)


def come_back(state: Path) -> bool:
    """Undo `leave`; False when it had not left."""
    return _take(state / LEFT)


def since(state: Path, name: str) -> str:
    """When PAUSED or LEFT began, UTC ISO 8601; empty when it does not hold.

    A file of another owner (`sudo flower-client pause`) began when it was written last.
    """
    path = state / name
    try:
        return printable(path.read_text(errors="replace").strip(), most=40)
    except FileNotFoundError:
        return ""
    except OSError:
        pass
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:
        return "an unknown time"


def _is_there(path: Path) -> bool:
    """What cannot be looked at holds: refusing is the safe side."""
    try:
        return path.exists()
    except OSError:
        return True


def _put(path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(datetime.now(UTC).isoformat(timespec="seconds") + "\n")
    return True


def _take(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
