"""What released, noised counts tell of tasks other than classification (`common.evaluation` has their cells).

Fewer scores than on exact data: exact match and average precision are not functions of these counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from common.noisy_ratios import FloatArray, least, mean_of_defined, ratio
from common.ordinal_metrics import kappa_and_distance
from common.task_kinds import MULTI_LABEL, ORDINAL


@dataclass(frozen=True)
class TaskRates:
    """The scores that a task's `confusion` tells."""

    names: tuple[str, ...]
    rates: Callable[[FloatArray, float], dict[str, FloatArray]]
    """From (n, ...) counts with noise of this deviation on every cell to (n,) each, NaN where undefined."""


def limits_of(classes: int) -> Mapping[str, tuple[float, float]]:
    """Scores that do not lie between 0 and 1: lowest and highest value."""
    return {"quadratic_kappa": (-1.0, 1.0), "mae": (0.0, float(classes - 1))}


def finding_rates(counts: FloatArray, deviation: float) -> dict[str, FloatArray]:
    """Macro F1 and Hamming loss of (n, findings, there, said) counts, as `common.multi_label_metrics`."""
    hits, there, said = counts[:, :, 1, 1], counts[:, :, 1].sum(axis=2), counts[:, :, :, 1].sum(axis=2)
    # The cell of hits stands in both sums, so its noise counts twice.
    f1s = ratio(2 * hits, there + said, least(deviation, 6))
    wrong = (counts[:, :, 0, 1] + counts[:, :, 1, 0]).sum(axis=1)
    cells = 4 * counts.shape[1]
    return {
        "f1": mean_of_defined(f1s),
        "hamming_loss": ratio(wrong, counts.sum(axis=(1, 2, 3)), least(deviation, cells)),
    }


def level_rates(counts: FloatArray, deviation: float) -> dict[str, FloatArray]:
    """Kappa, distance and rates of (n, true, said) counts of levels, as `common.ordinal_metrics`."""
    levels = counts.shape[1]
    everybody = least(deviation, levels**2)
    hits, actual = np.einsum("ncc->nc", counts), counts.sum(axis=2)
    kappa, distance = kappa_and_distance(counts, least=everybody)
    several = (actual > least(deviation, levels)).sum(axis=1) > 1
    recalls = mean_of_defined(ratio(hits, actual, least(deviation, levels)))
    return {
        "quadratic_kappa": kappa,
        "mae": distance,
        "accuracy": ratio(hits.sum(axis=1), counts.sum(axis=(1, 2)), everybody),
        "balanced_accuracy": np.where(several, recalls, np.nan),
    }


RATES: Final[Mapping[str, TaskRates]] = {
    MULTI_LABEL: TaskRates(("f1", "hamming_loss"), finding_rates),
    ORDINAL: TaskRates(("quadratic_kappa", "mae", "accuracy", "balanced_accuracy"), level_rates),
}
