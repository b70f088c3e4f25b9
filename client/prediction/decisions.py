"""From probabilities to a decision in words, by the kind of task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.multi_label_metrics import called
from common.ordinal_metrics import levels_of
from common.task_kinds import MULTI_LABEL, ORDINAL
from common.tasks import Task

NOTHING = "no finding"
"""The decision of a multi-label model that calls none of its findings."""


def decisions(
    task: Task,
    probabilities: NDArray[np.float64],
    *,
    threshold: float | None,
    thresholds: Sequence[float | None],
) -> list[str]:
    """(rows,) a class, a level, or the findings that are called with commas between.

    Two classes: the finding from `threshold` on. Findings: each from its own of `thresholds` on, above one
    half where it has none. Levels: the highest that is passed with more than one half.
    """
    if task.name == MULTI_LABEL:
        said = findings_called(probabilities, thresholds)
        return [_listed([n for n, there in zip(task.classes, row, strict=True) if there]) for row in said]
    places = levels_of(probabilities) if task.name == ORDINAL else decide(probabilities, threshold=threshold)
    return [task.classes[place] for place in places.tolist()]


def findings_called(
    probabilities: NDArray[np.float64], thresholds: Sequence[float | None]
) -> NDArray[np.bool_]:
    """(rows, findings) which are called."""
    own = np.array([np.nan if value is None else value for value in thresholds], np.float64)
    if not len(own):
        return called(probabilities)
    by_own = np.asarray(probabilities >= np.nan_to_num(own, nan=np.inf))
    return np.asarray(np.where(np.isnan(own), called(probabilities), by_own))


def decide(probabilities: NDArray[np.float64], *, threshold: float | None) -> NDArray[np.int64]:
    """(rows,) class of each row: the finding from `threshold` on, else the most probable, ties to the lower.

    As evaluation counts (`common.evaluation.count_patients`, `common.released_counts.operating_point`).
    """
    if threshold is not None:
        return np.asarray(probabilities[:, 1] >= threshold, np.int64)
    return np.asarray(np.nan_to_num(probabilities, nan=0.0).argmax(axis=1), np.int64)


def explained_classes(task: Task, probabilities: NDArray[np.float64]) -> NDArray[np.int64]:
    """(rows,) the class that a heat map speaks for: of two the finding, also where it is not called.

    Of several findings the most probable one, of levels the one that is decided.
    """
    if task.name == ORDINAL:
        return levels_of(probabilities)
    decided = decide(probabilities, threshold=None)
    return np.ones_like(decided) if len(task.classes) == 2 and task.name != MULTI_LABEL else decided


def rule(task: Task, *, threshold: float | None, thresholds: Sequence[float | None]) -> str:
    """How a decision follows from probabilities, in words."""
    if task.name == MULTI_LABEL:
        named = zip(task.classes, thresholds, strict=True) if thresholds else ()
        own = [f"{name} from {value:g} on" for name, value in named if value is not None]
        others = "every other finding" if own else "each finding (this model stores no operating points)"
        return "; ".join([*own, *([] if len(own) == len(task.classes) else [f"{others} above 0.5"])])
    if task.name == ORDINAL:
        return "the highest level that is reached with a probability above 0.5"
    if threshold is None:
        return "the most probable class (this model stores no operating point)"
    return f"{task.classes[1]} where its probability is at least {threshold:g}, the stored operating point"


def stored_thresholds(description: Any, task: Task) -> tuple[float | None, ...]:
    """The operating point of each finding, None where none is stored. Raises ValueError or KeyError."""
    points = description.get("operating_points") or ()
    if task.name != MULTI_LABEL or not points:
        return ()
    found = tuple(None if point is None else float(point["threshold"]) for point in points)
    if len(found) != len(task.classes) or not all(value is None or 0 <= value <= 1 for value in found):
        raise ValueError(f"operating points {list(found)} of {len(task.classes)} findings")
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or NOTHING
