"""What noised counts about validation patients tell: metrics, how far noise may have moved them, a threshold.

Everything here is post-processing of released counts (`common.evaluation`) and costs no privacy. Counts of
several hospitals are added first, so that a metric is that of all their patients together. Negative counts
are kept: sums then stay unbiased, which cutting at 0 would end; only the final score is kept within [0, 1].

A score is None where it is undefined, which includes: where the number it would be divided by is within two
standard deviations of its own noise of 0, so that nobody can tell whether there are such patients at all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from common.evaluation import CountPlan
from common.messages import CONFUSION, SCORES
from common.metrics import METRICS, FloatArray
from common.noisy_ratios import LEAST_DEVIATIONS as _LEAST_DEVIATIONS
from common.noisy_ratios import least as _least
from common.noisy_ratios import mean_of_defined as _mean_of_defined
from common.noisy_ratios import ratio as _ratio
from common.released_tasks import RATES, limits_of
from common.task_kinds import CLASSIFICATION, MULTI_LABEL

REDRAWS = 200
_SEED = 20_26


@dataclass(frozen=True, kw_only=True)
class ReleasedCounts:
    """Sums of the counts of some hospitals."""

    classes: int
    score_bins: int
    counts: Mapping[str, list[float]] = field(default_factory=dict)
    """By kind, flattened as in `common.evaluation`; only kinds that some hospital has released."""
    noise_variance: Mapping[str, float] = field(default_factory=dict)
    """By kind: variance of the noise on every cell of the sum; 0 for exact counts."""
    task: str = CLASSIFICATION

    def plan(self, kind: str) -> CountPlan:
        """The shapes of one kind."""
        return CountPlan.of([kind], classes=self.classes, score_bins=self.score_bins, task=self.task)

    def array(self, kind: str) -> FloatArray | None:
        """The counts in their shape, None where no hospital has released them."""
        if kind not in self.counts:
            return None
        return np.asarray(self.counts[kind], np.float64).reshape(self.plan(kind).shape(kind))

    def stddev(self, kind: str) -> float:
        """Standard deviation of the noise on every cell."""
        return math.sqrt(self.noise_variance.get(kind, 0.0))


def metrics_of(released: ReleasedCounts) -> dict[str, float | None]:
    """All of METRICS, or those of the task that counts can tell, as defined there, from released counts."""
    values = _metrics(released, redraws=0).items()
    limits = limits_of(released.classes)
    return {name: _within_bounds(found[0], *limits.get(name, (0.0, 1.0))) for name, found in values}


def noise_of_metrics(released: ReleasedCounts, *, redraws: int = REDRAWS) -> dict[str, float | None]:
    """Standard deviation of each metric due to the noise alone, None where it is undefined too often.

    Its level is public, so it is drawn again, `redraws` times from a fixed seed, on top of the released
    counts. Says nothing of chance in who the patients are.
    """
    redrawn = _metrics(released, redraws=redraws)
    return {name: _spread(values[1:]) for name, values in redrawn.items()}


def operating_point(released: ReleasedCounts) -> dict[str, Any] | None:
    """The bin edge at which sensitivity + specificity - 1 (Youden's J) is largest; two classes only.

    `threshold`: call the finding where its probability is at least this. None where no edge is better than
    the noise on it would explain.
    """
    scores = released.array(SCORES)
    if released.classes != 2 or released.task != CLASSIFICATION or scores is None:
        return None
    deviation = released.stddev(SCORES)
    drawn = _redrawn(scores, deviation, REDRAWS)[:, 0]
    totals = drawn.sum(axis=2)
    if (totals[0] <= _least(deviation, released.score_bins)).any():
        return None
    # Share of patients in the bins from edge 1, 2, ... upwards.
    above = drawn[:, :, ::-1].cumsum(axis=2)[:, :, -2::-1]
    shares = np.divide(
        above, totals[:, :, None], out=np.full_like(above, np.nan), where=totals[:, :, None] > 0
    )
    youden = shares[:, 0] - shares[:, 1]
    best = int(youden[0].argmax())
    noise = float(np.nanstd(youden[1:, best]))
    if not youden[0, best] > _LEAST_DEVIATIONS * noise:
        return None
    return {
        "threshold": (best + 1) / released.score_bins,
        "source": "noised validation counts, largest sensitivity + specificity - 1 over bin edges",
        "sensitivity": float(np.clip(shares[0, 0, best], 0, 1)),
        "specificity": float(np.clip(1 - shares[0, 1, best], 0, 1)),
        "noise": noise,
    }


def finding_points(released: ReleasedCounts) -> list[dict[str, Any] | None]:
    """`operating_point` of each finding of a multi-label task, in label order; empty without scores."""
    scores = released.array(SCORES)
    if released.task != MULTI_LABEL or scores is None:
        return []
    alone = replace(released, classes=2, task=CLASSIFICATION)
    return [operating_point(replace(alone, counts={SCORES: pair.ravel().tolist()})) for pair in scores]


def calibration(released: ReleasedCounts) -> list[dict[str, float | None]]:
    """Per bin of the finding's probability the share of patients who have it; two classes only.

    `observed` is None in a bin that noise alone could have filled. Empty where that is so in most of them.
    """
    scores = released.array(SCORES)
    if released.classes != 2 or released.task != CLASSIFICATION or scores is None:
        return []
    positives, others = scores[0]
    total, least = positives + others, _least(released.stddev(SCORES), 2)
    if least and 2 * (total > least).sum() < len(total):
        return []
    return [
        {
            "lower": bin_ / released.score_bins,
            "upper": (bin_ + 1) / released.score_bins,
            "patients": max(0.0, float(total[bin_])),
            "observed": float(np.clip(positives[bin_] / total[bin_], 0, 1)) if total[bin_] > least else None,
        }
        for bin_ in range(released.score_bins)
    ]


def _metrics(released: ReleasedCounts, *, redraws: int) -> dict[str, FloatArray]:
    """Each metric of the released counts (first) and of `redraws` noisier ones; NaN where undefined."""
    own = RATES.get(released.task)
    names = METRICS if own is None else ("auc", *own.names)
    values = dict.fromkeys(names, np.full(1 + redraws, np.nan))
    if (confusion := released.array(CONFUSION)) is not None:
        deviation = released.stddev(CONFUSION)
        drawn = _redrawn(confusion, deviation, redraws)
        values |= _rates(drawn, deviation) if own is None else own.rates(drawn, deviation)
    if (scores := released.array(SCORES)) is not None:
        deviation = released.stddev(SCORES)
        values["auc"] = _areas(_redrawn(scores, deviation, redraws), deviation)
    return values


def _redrawn(counts: FloatArray, deviation: float, redraws: int) -> FloatArray:
    """(1 + redraws, ...): the counts as they are, then with fresh noise of the same size on top."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    noise = deviation * random.standard_normal((redraws, *counts.shape))
    return np.concatenate([counts[None], counts[None] + noise])


def _rates(counts: FloatArray, deviation: float) -> dict[str, FloatArray]:
    """Metrics of (n, true, predicted) counts, each (n,); see `common.metrics.classification_metrics`."""
    classes = counts.shape[1]
    total, hits = counts.sum(axis=(1, 2)), np.einsum("ncc->nc", counts)
    actual, predicted = counts.sum(axis=2), counts.sum(axis=1)
    of_class = _least(deviation, classes)
    recalls = _ratio(hits, actual, of_class)
    specificities = _ratio(
        total[:, None] - actual - predicted + hits,
        total[:, None] - actual,
        _least(deviation, classes * (classes - 1)),
    )
    precisions = _ratio(hits, predicted, of_class)
    # A cell on the diagonal stands in both sums, so its noise counts twice.
    f1s = _ratio(2 * hits, actual + predicted, _least(deviation, 2 * classes + 2))
    several = (actual > of_class).sum(axis=1) > 1
    rates = {
        "accuracy": _ratio(hits.sum(axis=1), total, _least(deviation, classes**2)),
        "balanced_accuracy": np.where(several, _mean_of_defined(recalls), np.nan),
    }
    named = {"precision": precisions, "recall": recalls, "specificity": specificities, "f1": f1s}
    if classes == 2:
        return rates | {name: values[:, 1] for name, values in named.items()}
    # A class with patients that is never predicted counts as 0.
    named["precision"] = np.where((predicted <= of_class) & (actual > of_class), 0.0, precisions)
    return rates | {name: _mean_of_defined(values) for name, values in named.items()}


def _areas(scores: FloatArray, deviation: float) -> FloatArray:
    """AUC of (n, scored classes, of the class or not, bins) histograms, (n,): mean over the defined classes.

    The Mann-Whitney statistic over pairs of bins, half a credit within one: off by at most half the share of
    pairs that lie in the same bin. Source: Hanley and McNeil, Radiology 143 (1982).
    """
    positives, others = scores[:, :, 0], scores[:, :, 1]
    below = others.cumsum(axis=2) - others
    ordered = (positives * (below + others / 2)).sum(axis=2)
    least = _least(deviation, scores.shape[3])
    totals = positives.sum(axis=2), others.sum(axis=2)
    pairs = np.where((totals[0] > least) & (totals[1] > least), totals[0] * totals[1], 0.0)
    return _mean_of_defined(_ratio(ordered, pairs, 0.0))


def _spread(values: FloatArray) -> float | None:
    defined = values[np.isfinite(values)]
    if len(defined) <= len(values) / 2:
        return None
    return float(defined.std()) if np.ptp(defined) else 0.0


def _within_bounds(value: float, lowest: float, highest: float) -> float | None:
    return min(highest, max(lowest, float(value))) if math.isfinite(value) else None
