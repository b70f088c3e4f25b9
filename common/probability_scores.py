"""Scores of the probabilities themselves: average precision, Brier score, calibration error, with resamples.

Beside `common.metrics`, with the same conventions (`probabilities` (rows, classes), `targets` (rows,), two
classes: of the finding, more: the mean over classes; None where undefined) and the same resamples: all rows
of a patient stay together, and equal seeds draw the same patients. Computed on patients: private.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from common.metrics import (
    AnyArray,
    FloatArray,
    brier,
    expected_calibration_error,
    percentiles,
    resampled_rows,
    scored_classes,
)

PROBABILITY_SCORES = ("average_precision", "brier", "ece")
CALIBRATION_BINS = 10


def probability_scores(probabilities: AnyArray, targets: AnyArray) -> dict[str, float | None]:
    """All of PROBABILITY_SCORES."""
    return {
        "average_precision": average_precision(probabilities, targets),
        "brier": brier(probabilities, targets),
        "ece": expected_calibration_error(probabilities, targets, bins=CALIBRATION_BINS),
    }


def average_precision(probabilities: AnyArray, targets: AnyArray) -> float | None:
    """Precision summed over the steps of recall (scikit-learn's); the mean over the classes that have rows.

    None without rows and where a probability is not finite. Example: all positives before all negatives is 1.
    """
    from sklearn.metrics import average_precision_score

    if not len(targets) or not np.isfinite(probabilities).all():
        return None
    areas = [
        float(average_precision_score(targets == positive, probabilities[:, positive]))
        for positive in scored_classes(probabilities.shape[1])
        if (targets == positive).any()
    ]
    return float(np.mean(areas)) if areas else None


def precision_recall_points(
    probabilities: AnyArray, targets: AnyArray, *, positive: int = -1
) -> tuple[FloatArray, FloatArray] | None:
    """Recall and precision (scikit-learn's), recall rising from 0; None if undefined."""
    from sklearn.metrics import precision_recall_curve

    actual = targets == positive % probabilities.shape[1]
    if not actual.any() or not np.isfinite(probabilities).all():
        return None
    precision, recall, _ = precision_recall_curve(actual, probabilities[:, positive])
    return np.asarray(recall[::-1], np.float64), np.asarray(precision[::-1], np.float64)


def probability_intervals(
    probabilities: AnyArray,
    targets: AnyArray,
    *,
    units: AnyArray | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """Percentile bootstrap intervals of PROBABILITY_SCORES, drawn as in `common.metrics.bootstrap_ci`."""
    if not len(targets) or not np.isfinite(probabilities).all():
        return dict.fromkeys(PROBABILITY_SCORES, None)
    parts = [
        _weighted(probabilities, targets, weights)
        for weights in resampled_rows(len(targets), units=units, resamples=resamples, seed=seed)
    ]
    return {
        name: percentiles(np.concatenate([part[name] for part in parts]), confidence)
        for name in PROBABILITY_SCORES
    }


def roc_band(
    probabilities: AnyArray,
    targets: AnyArray,
    *,
    units: AnyArray | None = None,
    grid: FloatArray,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[FloatArray, FloatArray] | None:
    """Lower and upper true positive rate of the finding at each false positive rate of `grid`; two classes.

    Pointwise percentiles over resampled units; None where the curve is undefined.
    """
    actual = targets == 1
    if not 0 < np.count_nonzero(actual) < len(actual) or not np.isfinite(probabilities).all():
        return None
    curves = []
    for weights in resampled_rows(len(targets), units=units, resamples=resamples, seed=seed):
        hits, misses = _from_the_top(probabilities[:, 1], actual, weights)
        for hit, miss in zip(hits, misses, strict=True):
            if hit[-1] > 0 and miss[-1] > 0:
                rates = np.r_[0.0, miss / miss[-1]], np.r_[0.0, hit / hit[-1]]
                curves.append(_at(grid, *rates))
    if not curves:
        return None
    low, high = np.quantile(np.stack(curves), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def _at(grid: FloatArray, false_positives: FloatArray, true_positives: FloatArray) -> FloatArray:
    """The curve at each rate of `grid`; where it rises straight up, its upper end."""
    last = np.r_[false_positives[1:] != false_positives[:-1], True]
    return np.interp(grid, false_positives[last], true_positives[last])


def _weighted(probabilities: AnyArray, targets: AnyArray, weights: FloatArray) -> Mapping[str, FloatArray]:
    """Each score per row of `weights` (resamples, rows), NaN where undefined."""
    classes = list(scored_classes(probabilities.shape[1]))
    precisions = [_weighted_precision(probabilities[:, c], targets == c, weights) for c in classes]
    known = np.isfinite(np.stack(precisions, axis=1))
    sums = np.where(known, np.stack(precisions, axis=1), 0.0).sum(axis=1)
    total = weights.sum(axis=1)
    squares = ((probabilities - np.eye(probabilities.shape[1])[targets]) ** 2)[:, classes].sum(axis=1)
    return {
        "average_precision": _divided(sums, known.sum(axis=1)),
        "brier": _divided(weights @ squares, total),
        "ece": _divided(_calibration_gaps(probabilities, targets, weights), total),
    }


def _weighted_precision(scores: AnyArray, actual: npt.NDArray[np.bool_], weights: FloatArray) -> FloatArray:
    """Average precision per row of `weights`: sum of (step of recall) x precision, equal scores together."""
    hits, misses = _from_the_top(scores, actual, weights)
    precision = _divided(hits, hits + misses, nothing=0.0)
    steps = np.diff(hits, axis=1, prepend=0.0)
    return _divided((steps * precision).sum(axis=1), hits[:, -1])


def _from_the_top(
    scores: AnyArray, actual: npt.NDArray[np.bool_], weights: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Weight of the positives and of the others at or above each distinct score, the highest first."""
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    starts = np.flatnonzero(np.r_[True, falling[1:] != falling[:-1]])
    ordered, is_hit = weights[:, order], actual[order]
    hits = np.add.reduceat(ordered * is_hit, starts, axis=1).cumsum(axis=1)
    return hits, np.add.reduceat(ordered * ~is_hit, starts, axis=1).cumsum(axis=1)


def _calibration_gaps(probabilities: AnyArray, targets: AnyArray, weights: FloatArray) -> FloatArray:
    """Sum over bins of |weight said - weight so|, per row of `weights`; bins as `calibration_bins`."""
    if probabilities.shape[1] == 2:
        said, so = probabilities[:, 1], targets == 1
    else:
        said, so = probabilities.max(axis=1), targets == probabilities.argmax(axis=1)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    places = np.clip(np.searchsorted(edges, said, side="left") - 1, 0, CALIBRATION_BINS - 1)
    gaps = (said - so)[:, None] * np.eye(CALIBRATION_BINS)[places]
    return np.asarray(np.abs(weights @ gaps).sum(axis=1))


def _divided(numerator: AnyArray, denominator: AnyArray, *, nothing: float = np.nan) -> FloatArray:
    result = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), nothing)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result
