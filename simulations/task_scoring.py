"""What the simulation says of held-back patients in tasks other than classification; aggregates only.

The scores are those of `common.multi_label_metrics` and `common.ordinal_metrics`, their 95 % intervals by
bootstrap over patients: the same draws for every finding or threshold, so that their means are paired.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import metrics, ordinal_metrics
from common.multi_label_metrics import finding_metrics, two_columns
from common.task_kinds import MULTI_LABEL, ORDINAL
from common.tasks import Task

FloatArray = NDArray[np.float64]
Samples = dict[str, FloatArray]
_MOST_ROC_POINTS = 200


def has_own_scores(task: Task) -> bool:
    """Whether the task is scored here and not as a classification."""
    return task.name in (MULTI_LABEL, ORDINAL)


def task_evaluation(
    task: Task,
    probabilities: FloatArray,
    targets: NDArray[np.int64],
    units: NDArray[np.int64],
    *,
    seed: int,
) -> dict[str, Any]:
    """What the report shows of one split: metrics, intervals, scores and curves of each finding or step."""
    samples = task_samples(task, probabilities, targets, units, seed=seed)
    questions = _questions(task, probabilities, targets)
    levels = ordinal_metrics.confusion(probabilities, targets).tolist() if task.name == ORDINAL else None
    return {
        "metrics": task.metrics(probabilities, targets),
        "ci95": {name: _interval(values) for name, values in samples.items()},
        "per_class": {name: _scores(said, there, name) for name, (said, there) in questions.items()},
        "roc": {name: _curve(two_columns(said), there) for name, (said, there) in questions.items()},
        "confusion": levels,
        "classes": list(task.classes),
        "images": len(targets),
        "patients": len(np.unique(units)),
    }


def task_samples(
    task: Task,
    probabilities: FloatArray,
    targets: NDArray[np.int64],
    units: NDArray[np.int64],
    *,
    seed: int,
    resamples: int = 1000,
) -> Samples:
    """Scores in every resample of the patients, (resamples,) each, NaN where undefined."""
    if not len(targets) or not np.isfinite(probabilities).all():
        return {}
    wanted = ("auc", "f1") if task.name == MULTI_LABEL else ("auc",)
    each = [
        metrics.bootstrap_samples(
            two_columns(said), there, units=units, metrics=wanted, resamples=resamples, seed=seed
        )
        for said, there in _questions(task, probabilities, targets).values()
    ]
    samples = {name: _mean_of_defined(np.stack([found[name] for found in each])) for name in wanted}
    if task.name == ORDINAL:
        samples |= metrics.bootstrap_samples(
            ordinal_metrics.one_hot_levels(probabilities),
            targets,
            units=units,
            metrics=("accuracy", "balanced_accuracy"),
            resamples=resamples,
            seed=seed,
        )
    return samples


def _questions(
    task: Task, probabilities: FloatArray, targets: NDArray[np.int64]
) -> Mapping[str, tuple[FloatArray, NDArray[np.int64]]]:
    """The yes-or-no questions of a task by name: what was said (rows,) and what is so (rows,)."""
    if task.name == MULTI_LABEL:
        return {name: (probabilities[:, k], targets[:, k]) for k, name in enumerate(task.classes)}
    said = ordinal_metrics.beyond(probabilities)
    steps = enumerate(task.classes[:-1])
    return {f"beyond {name}": (said[:, k], (targets > k).astype(np.int64)) for k, name in steps}


def _scores(said: FloatArray, there: NDArray[np.int64], name: str) -> dict[str, float | int | None]:
    scores = finding_metrics(said[:, None], there[:, None], [name])[name]
    return scores | {"images_with": int(there.sum())}


def _curve(said: FloatArray, there: NDArray[np.int64]) -> dict[str, list[float]]:
    points = metrics.roc_points(said, there, positive=1)
    if points is None:
        return {"fpr": [], "tpr": []}
    kept = np.unique(np.linspace(0, len(points[0]) - 1, _MOST_ROC_POINTS).astype(np.int64))
    return {"fpr": np.round(points[0][kept], 5).tolist(), "tpr": np.round(points[1][kept], 5).tolist()}


def _mean_of_defined(values: FloatArray) -> FloatArray:
    defined = np.isfinite(values).sum(axis=0)
    return np.divide(
        np.nansum(values, axis=0), defined, out=np.full(values.shape[1], np.nan), where=defined > 0
    )


def _interval(values: FloatArray) -> list[float] | None:
    from simulations.comparison import interval_of

    bounds = interval_of(values)
    return None if bounds is None else list(bounds)
