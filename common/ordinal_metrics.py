"""Scores of ordered levels: pure functions on arrays, None where a score is undefined, never NaN.

Everywhere `probabilities` is (rows, K) over the levels and `targets` (rows,) levels 0..K-1. The level said is
the highest one beyond whose predecessor a row lies with more than one half (the median of its probabilities).
All are computed on patients: private.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from common import metrics

METRICS = ("auc", "quadratic_kappa", "mae", "accuracy", "balanced_accuracy")

AnyArray = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]


def beyond(probabilities: AnyArray) -> FloatArray:
    """(rows, K - 1) probability of lying beyond level 0, 1, ...: never rising from column to column."""
    return np.asarray(probabilities[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:], np.float64)


def levels_of(probabilities: AnyArray) -> npt.NDArray[np.int64]:
    """(rows,) level said; NaN counts as not beyond. Example: (.3, .3, .4) is level 1."""
    return np.asarray((np.nan_to_num(beyond(probabilities), nan=0.0) > 0.5).sum(axis=1), np.int64)


def ordinal_metrics(probabilities: AnyArray, targets: AnyArray) -> dict[str, float | None]:
    """All of METRICS: `auc` the mean over thresholds, `mae` in levels, the rest of the level said."""
    thresholds = threshold_auc(probabilities, targets)
    if not len(targets) or not np.isfinite(probabilities).all():
        return dict.fromkeys(METRICS, None)
    counts = confusion(probabilities, targets).astype(np.float64)
    rates = metrics.classification_metrics(one_hot_levels(probabilities), targets)
    kappa, distance = (float(values[0]) for values in kappa_and_distance(counts[None], least=0.0))
    defined = [area for area in thresholds if area is not None]
    return {
        "auc": float(np.mean(defined)) if defined else None,
        "quadratic_kappa": kappa if math.isfinite(kappa) else None,
        "mae": distance if math.isfinite(distance) else None,
        "accuracy": rates["accuracy"],
        "balanced_accuracy": rates["balanced_accuracy"],
    }


def threshold_auc(probabilities: AnyArray, targets: AnyArray) -> list[float | None]:
    """AUC of "beyond level k" for k = 0..K-2; None where all or no rows are beyond it."""
    said = beyond(probabilities)
    return [
        metrics.auc(np.stack([1 - said[:, k], said[:, k]], axis=1), (targets > k).astype(np.int64))
        for k in range(said.shape[1])
    ]


def one_hot_levels(probabilities: AnyArray) -> FloatArray:
    """(rows, K) the level said as certainty, for scores that look at the decision only."""
    return np.asarray(np.eye(probabilities.shape[1])[levels_of(probabilities)])


def confusion(probabilities: AnyArray, targets: AnyArray) -> npt.NDArray[np.int64]:
    """Rows of each true level (first axis) by level said (second)."""
    return metrics.confusion_matrix(one_hot_levels(probabilities), targets)


def kappa_and_distance(counts: FloatArray, *, least: float) -> tuple[FloatArray, FloatArray]:
    """Quadratic weighted kappa and mean distance in levels, each (n,), of (n, K, K) counts; NaN if undefined.

    kappa = 1 - sum(w O) / sum(w E), w_ij = (i - j)^2, E what the margins alone give. Source: Cohen, Weighted
    kappa, Psychological Bulletin 70 (1968). Undefined where no more than `least` rows are there or the
    margins leave nothing to disagree about.
    """
    levels = np.arange(counts.shape[1])
    away = np.abs(levels[:, None] - levels)
    total = counts.sum(axis=(1, 2))
    there = np.where(total > max(least, 0.0), total, np.nan)
    chance = counts.sum(axis=2)[:, :, None] * counts.sum(axis=1)[:, None, :] / there[:, None, None]
    by_chance = (away**2 * chance).sum(axis=(1, 2))
    by_chance = np.where(by_chance > 0, by_chance, np.nan)
    return 1 - (away**2 * counts).sum(axis=(1, 2)) / by_chance, (away * counts).sum(axis=(1, 2)) / there
