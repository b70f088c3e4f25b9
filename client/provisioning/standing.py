"""Whether this hospital takes part: paused and left are two small files in its state folder.

The worker looks before every task, so that a pause holds from the next round on without a restart.
"""

import os
from datetime import UTC, datetime
from pathlib import Path

PAUSED, LEFT = "paused", "left"


def is_paused(state: Path) -> bool:
    """Whether rounds are refused for now."""
    return (state / PAUSED).exists()


def has_left(state: Path) -> bool:
    """Whether the hospital has left the federation; `flower-client leave --off` undoes it."""
    return (state / LEFT).exists()


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
    """When PAUSED or LEFT began, UTC ISO 8601; empty when it does not hold."""
    try:
        return (state / name).read_text().strip()
    except FileNotFoundError:
        return ""


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
