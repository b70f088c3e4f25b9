"""Scores of several findings at once: pure functions on arrays, None where a score is undefined, never NaN.

Everywhere `probabilities` is (rows, findings), each in [0, 1] by itself, and `targets` (rows, findings) of 0
and 1. A finding is said where its probability exceeds one half. `auc`, `average_precision` and `f1` are plain
means over the findings for which they are defined (macro). All are computed on patients: private.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from common import metrics

METRICS = ("auc", "average_precision", "f1", "exact_match", "hamming_loss")
OF_FINDING = ("auc", "average_precision", "precision", "recall", "specificity", "f1")
"""Scores of one finding against the rest."""

AnyArray = npt.NDArray[Any]


def called(probabilities: AnyArray, thresholds: Sequence[float] | None = None) -> npt.NDArray[np.bool_]:
    """(rows, findings) which findings are said: above one half, or from its own threshold on."""
    if thresholds is None:
        return np.asarray(probabilities > 0.5)
    return np.asarray(probabilities >= np.asarray(thresholds))


def multi_label_metrics(probabilities: AnyArray, targets: AnyArray) -> dict[str, float | None]:
    """All of METRICS.

    `exact_match` is the share of rows with every finding judged rightly (subset accuracy), `hamming_loss` the
    share of single judgements that are wrong. Example: one of two rows has one of two findings wrong: exact
    match 0.5, Hamming loss 0.25.
    """
    _check(probabilities, targets)
    if not len(targets) or not np.isfinite(probabilities).all():
        return dict.fromkeys(METRICS, None)
    wrong = called(probabilities) != (targets == 1)
    each = [_finding(probabilities[:, k], targets[:, k]) for k in range(targets.shape[1])]
    macro = {name: _mean([scores[name] for scores in each]) for name in ("auc", "average_precision", "f1")}
    return macro | {
        "exact_match": float((~wrong).all(axis=1).mean()),
        "hamming_loss": float(wrong.mean()),
    }


def finding_metrics(
    probabilities: AnyArray, targets: AnyArray, names: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """OF_FINDING by finding, in the order of the columns."""
    _check(probabilities, targets)
    return {name: _finding(probabilities[:, k], targets[:, k]) for k, name in enumerate(names)}


def two_columns(probabilities: AnyArray) -> npt.NDArray[np.float64]:
    """(rows, 2) without and with the finding, from its probability (rows,): a classification of its own."""
    return np.stack([1 - probabilities, probabilities], axis=1).astype(np.float64)


def _finding(said: AnyArray, there: AnyArray) -> dict[str, float | None]:
    from sklearn.metrics import average_precision_score

    if not np.isfinite(said).all():
        return dict.fromkeys(OF_FINDING, None)
    scores = metrics.classification_metrics(two_columns(said), there.astype(np.int64))
    precision = float(average_precision_score(there, said)) if there.any() else None
    scores |= {"average_precision": precision}
    return {name: scores[name] for name in OF_FINDING}


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _check(probabilities: AnyArray, targets: AnyArray) -> None:
    if probabilities.ndim != 2 or targets.shape != probabilities.shape:
        raise ValueError(
            f"expected probabilities and targets (rows, findings), got {probabilities.shape} and "
            f"{targets.shape}"
        )
    if len(targets) and not np.isin(targets, (0, 1)).all():
        raise ValueError("targets must be 0 or 1")
