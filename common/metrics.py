"""Scores of a classifier: pure functions on arrays, None where a score is undefined, never NaN.

Everywhere `probabilities` is (rows, classes) and `targets` (rows,) with labels 0..classes-1. With two classes
the last one is the finding, the positive class, and a row is called positive when its probability exceeds
one half. With more classes a score is the mean over classes, each against the rest. A score is undefined
without rows, where it would divide by zero, and where a probability is not finite. All are private.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
AnyArray = npt.NDArray[Any]

METRICS = ("auc", "accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1")

_LARGEST_UNDEFINED_SHARE = 0.05
_ENTRIES_AT_ONCE = 4_000_000


def auc(probabilities: AnyArray, targets: AnyArray) -> float | None:
    """Area under the ROC curve (scikit-learn's); macro one-against-rest for more than two classes.

    A class that no row or every row has is left out of the mean; None when none is left.
    Example: positives scored .4 and .8, negatives .1 and .6: 3 of 4 pairs in order, 0.75.
    """
    from sklearn.metrics import roc_auc_score

    _check(probabilities, targets)
    if not np.isfinite(probabilities).all():
        return None
    areas = [
        float(roc_auc_score(targets == positive, probabilities[:, positive]))
        for positive in scored_classes(probabilities.shape[1])
        if 0 < np.count_nonzero(targets == positive) < len(targets)
    ]
    return float(np.mean(areas)) if areas else None


def classification_metrics(probabilities: AnyArray, targets: AnyArray) -> dict[str, float | None]:
    """All of METRICS. Two classes: of the positive class. More: macro means.

    Macro recall, which is balanced accuracy, is over the classes that have rows; macro precision and f1 also
    count, as 0, a class with rows that is never predicted; specificity is over classes that some row has not.
    """
    area = auc(probabilities, targets)
    if not np.isfinite(probabilities).all():
        return dict.fromkeys(METRICS, None)
    counts = confusion_matrix(probabilities, targets)[None].astype(np.float64)
    rest = {name: _defined(float(value[0])) for name, value in _scores_of_counts(counts).items()}
    return {"auc": area} | rest


def confusion_matrix(probabilities: AnyArray, targets: AnyArray) -> IntArray:
    """Rows of each true class (first axis) by predicted class (second); a tie goes to the lower label."""
    _check(probabilities, targets)
    classes = probabilities.shape[1]
    cells = targets * classes + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes).astype(np.int64)


def roc_points(
    probabilities: AnyArray, targets: AnyArray, *, positive: int = -1
) -> tuple[FloatArray, FloatArray] | None:
    """False and true positive rates from (0, 0) to (1, 1), one class against the rest; None if undefined."""
    from sklearn.metrics import roc_curve

    _check(probabilities, targets)
    actual = targets == positive % probabilities.shape[1]
    if not 0 < np.count_nonzero(actual) < len(actual) or not np.isfinite(probabilities).all():
        return None
    false_positive_rate, true_positive_rate, _ = roc_curve(actual, probabilities[:, positive])
    return np.asarray(false_positive_rate, np.float64), np.asarray(true_positive_rate, np.float64)


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Rows whose probability lies in (lower, upper], the first bin also at 0."""

    lower: float
    upper: float
    count: int
    """Rows in the bin, at least 1."""
    mean_probability: float
    """What the model said on average."""
    observed: float
    """Share of the rows for which it was so."""


def calibration_bins(probabilities: AnyArray, targets: AnyArray, *, bins: int = 10) -> list[CalibrationBin]:
    """Occupied bins of equal width over [0, 1]; empty when nothing is defined.

    Two classes: probability of the finding against its share. More: probability of the predicted class
    against how often it was right.
    """
    _check(probabilities, targets)
    if not np.isfinite(probabilities).all():
        return []
    if probabilities.shape[1] == 2:
        said, so = probabilities[:, 1], targets == 1
    else:
        said, so = probabilities.max(axis=1), targets == probabilities.argmax(axis=1)
    edges = np.linspace(0, 1, bins + 1)
    places = np.clip(np.searchsorted(edges, said, side="left") - 1, 0, bins - 1)
    return [
        CalibrationBin(
            lower=float(edges[place]),
            upper=float(edges[place + 1]),
            count=int(np.count_nonzero(places == place)),
            mean_probability=float(said[places == place].mean()),
            observed=float(so[places == place].mean()),
        )
        for place in np.unique(places)
    ]


def expected_calibration_error(probabilities: AnyArray, targets: AnyArray, *, bins: int = 10) -> float | None:
    """Mean distance between said and observed over `calibration_bins`, weighted by rows.

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, equation 3.
    """
    occupied = calibration_bins(probabilities, targets, bins=bins)
    total = sum(place.count for place in occupied)
    gaps = sum(place.count * abs(place.mean_probability - place.observed) for place in occupied)
    return gaps / total if total else None


def brier(probabilities: AnyArray, targets: AnyArray) -> float | None:
    """Mean squared error of the probabilities, in [0, 1] for two classes and [0, 2] for more.

    Two classes: of the finding alone. More: summed over classes. Example: finding said .8 and there: 0.04.
    """
    _check(probabilities, targets)
    if not len(targets) or not np.isfinite(probabilities).all():
        return None
    squares = (probabilities - np.eye(probabilities.shape[1])[targets]) ** 2
    return float(squares[:, list(scored_classes(probabilities.shape[1]))].sum(axis=1).mean())


def bootstrap_ci(
    probabilities: AnyArray,
    targets: AnyArray,
    *,
    units: AnyArray | None = None,
    metrics: Sequence[str] = ("auc", "accuracy", "recall", "f1"),
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """Percentile bootstrap intervals; draws whole units (patients), so that their rows stay together.

    `units` is (rows,) of any integers, equal for the rows of one patient; None makes each row a unit. The
    same seed gives the same intervals. None where the metric is undefined in more than 5 % of the resamples:
    leaving many out would make the interval look surer than it is.
    """
    _check(probabilities, targets)
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown or resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"cannot bootstrap {unknown or metrics} with {resamples} resamples at {confidence}")
    if not len(targets) or not np.isfinite(probabilities).all():
        return dict.fromkeys(metrics, None)
    samples = bootstrap_samples(
        probabilities, targets, units=units, metrics=metrics, resamples=resamples, seed=seed
    )
    return {name: percentiles(values, confidence) for name, values in samples.items()}


def bootstrap_samples(
    probabilities: AnyArray,
    targets: AnyArray,
    *,
    units: AnyArray | None = None,
    metrics: Sequence[str] = ("auc", "accuracy", "recall", "f1"),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, FloatArray]:
    """Each metric in every resample of the units, (resamples,), NaN where undefined.

    The draws depend on seed, number of rows and units only, so models on the same rows are paired.
    """
    parts = [
        _weighted_metrics(probabilities, targets, weights, metrics)
        for weights in resampled_rows(len(targets), units=units, resamples=resamples, seed=seed)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in metrics}


def resampled_rows(rows: int, *, units: AnyArray | None, resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each row is drawn with its unit, (some resamples, rows) at a time, as memory allows."""
    unit_of_row = np.arange(rows) if units is None else np.unique(units, return_inverse=True)[1]
    random = np.random.Generator(np.random.PCG64(seed))
    at_once = max(1, _ENTRIES_AT_ONCE // rows)
    for start in range(0, resamples, at_once):
        drawn = _unit_counts(random, min(at_once, resamples - start), int(unit_of_row.max()) + 1)
        yield drawn[:, unit_of_row]


def _unit_counts(random: np.random.Generator, resamples: int, num_units: int) -> FloatArray:
    """How often each unit is drawn, (resamples, num_units): num_units draws with replacement each."""
    drawn = random.integers(num_units, size=(resamples, num_units))
    cells = drawn + num_units * np.arange(resamples)[:, None]
    counts = np.bincount(cells.ravel(), minlength=resamples * num_units)
    return counts.reshape(resamples, num_units).astype(np.float64)


def _weighted_metrics(
    probabilities: AnyArray, targets: AnyArray, weights: FloatArray, metrics: Sequence[str]
) -> Mapping[str, FloatArray]:
    """Each metric per resample, NaN where undefined; `weights` (resamples, rows) counts each row's draws."""
    classes = probabilities.shape[1]
    cells = np.eye(classes**2)[targets * classes + probabilities.argmax(axis=1)]
    values = _scores_of_counts((weights @ cells).reshape(-1, classes, classes))
    if "auc" in metrics:
        areas = [
            _weighted_auc(probabilities[:, positive], targets == positive, weights)
            for positive in scored_classes(classes)
        ]
        values["auc"] = _mean_of_defined(np.stack(areas, axis=1))
    return values


def _weighted_auc(scores: AnyArray, actual: npt.NDArray[np.bool_], weights: FloatArray) -> FloatArray:
    """Share of (positive, negative) pairs in the right order, ties half, per row of `weights`.

    Source: Hanley and McNeil, Radiology 143 (1982): the area is the Mann-Whitney statistic.
    """
    order = np.argsort(scores, kind="stable")
    ascending = scores[order]
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
    positives = np.add.reduceat(weights[:, order] * actual[order], starts, axis=1)
    negatives = np.add.reduceat(weights[:, order] * ~actual[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    return _ratio((positives * (below + negatives / 2)).sum(axis=1), pairs)


def _scores_of_counts(counts: FloatArray) -> dict[str, FloatArray]:
    """Every metric but AUC from (n, classes, classes) confusion counts, each (n,), NaN where undefined."""
    total = counts.sum(axis=(1, 2))
    hits = np.einsum("ncc->nc", counts)
    actual, predicted = counts.sum(axis=2), counts.sum(axis=1)
    recalls = _ratio(hits, actual)
    # Of the rows that are not of the class: those also not called it.
    specificities = _ratio(total[:, None] - actual - predicted + hits, total[:, None] - actual)
    precisions, f1s = _ratio(hits, predicted), _ratio(2 * hits, actual + predicted)
    balanced = np.where((actual > 0).sum(axis=1) > 1, _mean_of_defined(recalls), np.nan)
    result = {"accuracy": _ratio(hits.sum(axis=1), total), "balanced_accuracy": balanced}
    if counts.shape[1] == 2:
        of_class = {"precision": precisions, "recall": recalls, "specificity": specificities, "f1": f1s}
        return result | {name: values[:, 1] for name, values in of_class.items()}
    precisions = np.where((predicted == 0) & (actual > 0), 0.0, precisions)
    means = {"precision": precisions, "recall": recalls, "specificity": specificities, "f1": f1s}
    return result | {name: _mean_of_defined(values) for name, values in means.items()}


def scored_classes(classes: int) -> Sequence[int]:
    """Classes that are scored against the rest: only the finding when there are two."""
    return [1] if classes == 2 else range(classes)


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    nowhere = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=nowhere, where=denominator > 0)
    return nowhere


def _mean_of_defined(values: FloatArray) -> FloatArray:
    """Mean over the second axis of the entries that are not NaN; NaN where all are."""
    return _ratio(np.nansum(values, axis=1), np.isfinite(values).sum(axis=1).astype(np.float64))


def percentiles(values: FloatArray, confidence: float) -> tuple[float, float] | None:
    """The middle share `confidence` of resampled values; None where more than 5 % are undefined."""
    defined = values[np.isfinite(values)]
    if len(defined) < (1 - _LARGEST_UNDEFINED_SHARE) * len(values):
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check(probabilities: AnyArray, targets: AnyArray) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or targets.shape != probabilities.shape[:1]:
        raise ValueError(
            f"expected probabilities (rows, classes >= 2) and targets (rows,), "
            f"got {probabilities.shape} and {targets.shape}"
        )
    if len(targets) and not (targets.min() >= 0 and targets.max() < probabilities.shape[1]):
        raise ValueError(f"targets must lie in 0..{probabilities.shape[1] - 1}")
