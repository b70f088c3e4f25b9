"""The lines of `metrics.jsonl`: how each hospital took part in a round, and how the round closed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTCOMES = ("aggregated", "late", "refused", "invalid", "failed")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How one hospital took part in one round; times are Unix seconds."""

    round_number: int
    attempt: int
    hospital: str
    outcome: str
    code: str | None
    sent: float | None
    training_started: float | None
    training_ended: float | None
    received: float | None
    bytes_down: int
    bytes_up: int
    epsilon: float | None
    """Epsilon spent after this round, where the hospital said it."""

    @property
    def training_s(self) -> float | None:
        """Seconds of training inside the hospital."""
        if self.training_started is None or self.training_ended is None:
            return None
        return self.training_ended - self.training_started


@dataclass(frozen=True, kw_only=True)
class ClosedRound:
    """One closed round of the server."""

    round_number: int
    attempt: int
    closed: float
    aggregated: int
    update_norm: float | None


def metric_lines(path: Path) -> list[Mapping[str, Any]]:
    """The whole lines of `metrics.jsonl`; a torn last line of a killed run is left out."""
    if not path.is_file():
        return []
    return [line for text in path.read_text().splitlines() if (line := metric_line(text)) is not None]


def metric_line(text: str) -> Mapping[str, Any] | None:
    """One line of `metrics.jsonl`, None when it is torn or belongs to no round."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("round"), int) else None


def reply_of(line: Mapping[str, Any]) -> Reply:
    """Read the line of a hospital."""
    code = line.get("code")
    return Reply(
        round_number=int(line["round"]),
        attempt=int(line.get("attempt") or 0),
        hospital=str(line["hospital"]),
        outcome=str(line.get("outcome")),
        code=None if code is None else str(code),
        sent=number(line.get("sent")),
        training_started=number(line.get("training_started")),
        training_ended=number(line.get("training_ended")),
        received=number(line.get("received")),
        bytes_down=int(number(line.get("bytes_down")) or 0),
        bytes_up=int(number(line.get("bytes_up")) or 0),
        epsilon=number(line.get("epsilon")),
    )


def closed_round_of(line: Mapping[str, Any]) -> ClosedRound:
    """Read the line of a closed round."""
    return ClosedRound(
        round_number=int(line["round"]),
        attempt=int(line.get("attempt") or 0),
        closed=number(line.get("closed")) or 0.0,
        aggregated=int(number(line.get("aggregated")) or 0),
        update_norm=number(line.get("update_norm")),
    )


def number(value: Any) -> float | None:
    """A finite or infinite number as float, None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
