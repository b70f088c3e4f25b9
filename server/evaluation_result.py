"""What `evaluations.jsonl` says of a run: the `validation` of `result.json`, and what travels with the model.

Everything here is computed from noised counts that hospitals have released, and costs nothing more.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.released_counts import (
    ReleasedCounts,
    calibration,
    finding_points,
    metrics_of,
    noise_of_metrics,
    operating_point,
)
from common.task_kinds import CLASSIFICATION
from server.exposure import PERHAPS_CHARGED
from server.update_checks import Outcome

EVALUATIONS = "evaluations.jsonl"
COUNTED, NOT_SENT = "counted", "not-sent"
"""Outcome of a hospital whose counts are in the sum; code of a question that did not go out."""

Line = Mapping[str, Any]


def evaluations_in(folder: Path) -> list[Line]:
    """The whole lines of `evaluations.jsonl`; a torn one is left out."""
    path = folder / EVALUATIONS
    texts = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [line for text in texts if (line := _line(text)) is not None]


def counted_hospitals(line: Line) -> list[str]:
    """Names of the hospitals whose counts are in the sum."""
    return sorted(name for name, one in line["hospitals"].items() if one["outcome"] == COUNTED)


def validation_block(folder: Path, *, model_sha256: str | None = None) -> dict[str, Any]:
    """`validation` (None without counts) and `validation_checkpoints`, for `result.json`.

    `validation` is about the final model; with `model_sha256` it is None where another model was scored.
    """
    scored = {(line["round"], line["model_sha256"]): line for line in _counted(folder)}
    final = _final(folder, model_sha256)
    earlier = [line for line in scored.values() if final is None or not _same_model(line, final)]
    return {
        "validation": None if final is None else _scores(final),
        "validation_checkpoints": [_scores(line) for line in sorted(earlier, key=lambda line: line["round"])],
    }


def validation_costs(folder: Path) -> dict[str, dict[str, Any]]:
    """By hospital: what the evaluations cost its validation patients, other patients than those who train.

    `validation_epsilon_complete` is False where it may have charged for an evaluation that was never
    received; a later answer covers it, since its epsilon is that of all evaluations of the run.
    """
    costs: dict[str, dict[str, Any]] = {}
    for line in evaluations_in(folder):
        for name, one in line["hospitals"].items():
            known = costs.setdefault(name, {"validation_epsilon": None, "validation_epsilon_complete": True})
            if one["outcome"] == COUNTED:
                stated = [e for e in (known["validation_epsilon"], one["epsilon"]) if e is not None]
                known |= {
                    "validation_epsilon": max(stated, default=None),
                    "validation_epsilon_complete": True,
                }
            elif _perhaps_charged(one):
                known["validation_epsilon_complete"] = False
    return costs


def model_numbers(folder: Path, *, model_sha256: str | None = None) -> dict[str, Any]:
    """What travels with the model and was fitted on patients: a threshold and a table, from noised counts."""
    final = _final(folder, model_sha256)
    if final is None:
        return {"operating_point": None, "calibration": []}
    released = _released(final)
    point, points = operating_point(released), finding_points(released)
    return {"operating_point": point, "calibration": calibration(released)} | (
        {"operating_points": points} if points else {}
    )


def _scores(line: Line) -> dict[str, Any]:
    released, counted = _released(line), counted_hospitals(line)
    known = set(counted)
    epsilons = [line["hospitals"][name]["epsilon"] for name in counted]
    deltas = [line["hospitals"][name]["delta"] for name in counted]
    return {
        "round": line["round"],
        "model_sha256": line["model_sha256"],
        "hospitals": counted,
        "left_out": {
            name: one["code"] or one["outcome"]
            for name, one in line["hospitals"].items()
            if name not in known
        },
        **metrics_of(released),
        "noise": noise_of_metrics(released),
        "epsilon": _largest(epsilons),
        "delta": _largest(deltas),
    }


def _released(line: Line) -> ReleasedCounts:
    return ReleasedCounts(
        classes=line["classes"],
        score_bins=line["score_bins"],
        counts=line["counts"],
        noise_variance=line["noise_variance"],
        task=line.get("task", CLASSIFICATION),
    )


def _counted(folder: Path) -> list[Line]:
    return [line for line in evaluations_in(folder) if counted_hospitals(line)]


def _final(folder: Path, model_sha256: str | None) -> Line | None:
    """The newest evaluation of a final model, None where there is none of this one."""
    finals = [line for line in _counted(folder) if line["final"]]
    if model_sha256 is not None:
        finals = [line for line in finals if line["model_sha256"] == model_sha256]
    return finals[-1] if finals else None


def _same_model(first: Line, second: Line) -> bool:
    return bool(first["round"] == second["round"] and first["model_sha256"] == second["model_sha256"])


def _perhaps_charged(one: Mapping[str, Any]) -> bool:
    if one["outcome"] == Outcome.REFUSED:
        return str(one["code"]) in PERHAPS_CHARGED
    return bool(one["code"] != NOT_SENT)


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _line(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    wanted = {
        "round",
        "final",
        "model_sha256",
        "classes",
        "score_bins",
        "hospitals",
        "counts",
        "noise_variance",
    }
    return line if isinstance(line, dict) and wanted <= set(line) else None
