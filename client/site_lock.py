"""One process of a hospital at a time: a lock that the kernel releases when its holder dies."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import LedgerError

CLIENT_LOCK = ".client.lock"
"""Held in the state folder by `flower-client start`."""
_POLL_S = 0.02


@contextmanager
def site_lock(folder: Path, *, timeout_s: float = 60.0, name: str = "site.lock") -> Iterator[None]:
    """Hold the lock `name` in `folder`, alone on this machine; raise LedgerError after `timeout_s`.

    Not re-entrant: a second `site_lock` of the same process waits like any other.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _acquire(descriptor, time.monotonic() + timeout_s, timeout_s)
        try:
            yield
        finally:
            # Not left to close(): a process forked meanwhile would keep the lock alive.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, deadline: float, timeout_s: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LedgerError(
                    f"another process of this hospital held the lock for {timeout_s:g} s",
                    why="two trainings at once could spend the same budget twice",
                    fix="wait for the other one to end, or stop it",
                ) from None
            time.sleep(_POLL_S)
