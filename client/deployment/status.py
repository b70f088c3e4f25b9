"""`state/status.json`: what `flower-client status` shows, written when it changes."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.deployment.work import Work
from common.files import write_json_atomically

SCHEMA = 1


def status_of(
    *,
    hospital: str,
    federation: str,
    address: str,
    connected_since: float | None,
    last_connected: float | None,
    standing: str,
    fault: str,
    work: Work,
    epsilon_limit: float,
) -> dict[str, Any]:
    """The content, as JSON values; times are UTC ISO 8601, null where there is none."""
    return {
        "schema": SCHEMA,
        "hospital": hospital,
        "federation": federation,
        "address": address,
        "connected": connected_since is not None,
        "connected_since": _iso(connected_since),
        "last_connected": _iso(last_connected),
        "standing": standing,
        "last_error": fault,
        "worker": {"phase": work.phase.value, "since": _iso(work.since), "answered": work.done},
        "last_answer": {"type": work.last_type, "time": _iso(work.last_ended)},
        "last_round": work.last_round,
        "last_run": work.last_run,
        "last_refusal": work.last_refusal,
        "run_epsilon": work.epsilon,
        "epsilon_limit": epsilon_limit,
    }


class StatusFile:
    """Writes the file when its content has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: Mapping[str, Any] = {}

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace the file unless it says the same already. May raise OSError."""
        if content == self._written:
            return
        write_json_atomically(self._path, {**content, "updated": _iso(time.time())}, mode=0o600)
        self._written = dict(content)


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
