"""What the worker is doing, in a small file that the supervisor reads."""

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any


class Phase(StrEnum):
    """Where the worker is."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"


@dataclass(frozen=True, kw_only=True)
class Work:
    """The worker's own words about itself, which hold no patient's data."""

    pid: int = 0
    phase: Phase = Phase.STARTING
    since: float = field(default_factory=time.time)
    """Unix seconds of the last change of phase."""
    done: int = 0
    """Tasks that were answered."""
    lost: int = 0
    """Tasks whose SuperNode may wait for an answer that will not come."""
    last_type: str = ""
    last_round: int | None = None
    last_run: str = ""
    last_ended: float | None = None
    """Unix seconds."""
    last_refusal: str = ""
    """Code of the last refusal; kept until a round is answered with an update."""
    epsilon: float | None = None
    """What the last run has cost after its last answered round, as stated to the server."""
    last_evaluated: float | None = None
    """Unix seconds of the last answer with counts about validation patients; a model soon follows it."""
    evaluation_epsilon: float | None = None
    """What the evaluations of that run have cost the validation patients, as stated to the server."""

    def at(self, phase: Phase, **changes: Any) -> "Work":
        """The same, in another phase from now on."""
        return replace(self, phase=phase, since=time.time(), **changes)


def write_work(path: Path, work: Work) -> None:
    """Replace the file; not durable, it speaks of a living process only."""
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(work), file)
    os.replace(new, path)


def beat(path: Path) -> None:
    """Say that the worker gets on. May raise OSError."""
    os.utime(path)


def last_beat(path: Path) -> int | None:
    """A number that changes with every beat and every change of the file; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def read_work(path: Path) -> Work:
    """What was written last; a worker that has just been started where there is nothing to read."""
    try:
        values = json.loads(path.read_text())
        known = {key: values[key] for key in (f.name for f in fields(Work)) if key in values}
        return Work(**{**known, "phase": Phase(known["phase"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Work()
