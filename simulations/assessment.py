"""What a reviewer asks of a final model, on the simulation's own test patients: exact, and by patient.

The operating point and the recalibration are those that the run has stored with the model: both come from
the hospitals' noised counts, and nothing is chosen here. A real federation has no such test split.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import metrics, probability_scores
from common.recalibration import recalibrated
from simulations.held_back import ScoredSet
from simulations.subgroups import subgroup_scores

FloatArray = NDArray[np.float64]

RATES = ("accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1")
"""Scores that depend on where the finding is called."""
_GRID = np.linspace(0, 1, 51)
_MOST_POINTS = 200
_OF_HOSPITALS = ("auc", "balanced_accuracy")
_RESAMPLES_OF_HOSPITALS = 500


def assessment(
    probabilities: FloatArray, scored: ScoredSet, *, numbers: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Everything beside the scores at one half; `numbers` are what model.json says of the final model."""
    point, points = numbers.get("operating_point"), numbers.get("recalibration")
    targets = scored.targets
    called = decisions(probabilities, point)
    content: dict[str, Any] = {
        "precision_recall": _precision_recall(probabilities, targets),
        "subgroups": subgroup_scores(
            probabilities, called, targets, units=scored.units, strata=scored.strata, seed=seed
        ),
    }
    if probabilities.shape[1] != 2 or not np.isfinite(probabilities).all():
        return content
    content["thresholds"] = threshold_curve(probabilities, targets)
    band = probability_scores.roc_band(probabilities, targets, units=scored.units, grid=_GRID, seed=seed)
    if band is not None:
        content["roc_band"] = {
            "fpr": _GRID.tolist(), "low": _rounded(band[0]), "high": _rounded(band[1])
        }  # fmt: skip
    if point is not None:
        content["at_operating_point"] = at_threshold(probabilities, scored, point=point, seed=seed)
    if points is not None:
        content["recalibrated"] = _recalibrated(probabilities, targets, points)
    return content


def decisions(probabilities: FloatArray, point: Mapping[str, Any] | None) -> FloatArray:
    """(rows, classes) with 1 for the class that is called, at the operating point where there is one."""
    if point is None or probabilities.shape[1] != 2:
        called = np.nan_to_num(probabilities, nan=0.0).argmax(axis=1)
    else:
        called = (probabilities[:, 1] >= point["threshold"]).astype(np.int64)
    return np.asarray(np.eye(probabilities.shape[1])[called], np.float64)


def at_threshold(
    probabilities: FloatArray, scored: ScoredSet, *, point: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """RATES with intervals by patient, and the confusion matrix, calling the finding from a threshold on."""
    called = decisions(probabilities, point)
    found = metrics.classification_metrics(called, scored.targets)
    bounds = metrics.bootstrap_ci(called, scored.targets, units=scored.units, metrics=RATES, seed=seed)
    return {
        "threshold": point["threshold"],
        "source": point.get("source", ""),
        "metrics": {name: found[name] for name in RATES},
        "ci95": {name: pair and list(pair) for name, pair in bounds.items()},
        "confusion": metrics.confusion_matrix(called, scored.targets).tolist(),
    }


def threshold_curve(probabilities: FloatArray, targets: NDArray[np.int64]) -> dict[str, list[float | None]]:
    """Sensitivity and specificity calling the finding from 0, .01, ... 1 on; None without patients."""
    thresholds = np.linspace(0, 1, 101)
    said = [np.sort(probabilities[targets == label, 1]) for label in (0, 1)]
    below = [np.searchsorted(rows, thresholds, side="left") / max(1, len(rows)) for rows in said]
    return {
        "threshold": _rounded(thresholds),
        "sensitivity": _rounded(1 - below[1]) if len(said[1]) else [None] * len(thresholds),
        "specificity": _rounded(below[0]) if len(said[0]) else [None] * len(thresholds),
    }


def of_hospital(
    probabilities: FloatArray,
    scored: ScoredSet,
    mine: NDArray[np.bool_],
    *,
    numbers: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """A hospital's own kind of test patients: rates at the operating point, intervals of two scores."""
    said, targets, units = probabilities[mine], scored.targets[mine], scored.units[mine]
    called = decisions(said, numbers.get("operating_point"))
    resamples: dict[str, Any] = {"units": units, "resamples": _RESAMPLES_OF_HOSPITALS, "seed": seed}
    area = metrics.bootstrap_ci(said, targets, metrics=("auc",), **resamples)["auc"]
    balanced = metrics.bootstrap_ci(called, targets, metrics=("balanced_accuracy",), **resamples)
    found = metrics.classification_metrics(called, targets)
    return {
        "at_operating_point": {name: found[name] for name in RATES},
        "ci95": {"auc": area and list(area), "balanced_accuracy": _listed(balanced["balanced_accuracy"])},
    }


def worst_hospital(hospitals: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By score, the hospital whose patients the model serves worst; empty where fewer than two are known."""
    worst = {}
    for name in _OF_HOSPITALS:
        known = {
            hospital: value
            for hospital, scores in hospitals.items()
            if (value := _score_of(scores, name)) is not None
        }
        if len(known) > 1:
            hospital = min(known, key=lambda one: known[one])
            worst[name] = {"hospital": hospital, "value": known[hospital]}
    return worst


def _score_of(scores: Mapping[str, Any], name: str) -> float | None:
    value = scores.get("auc") if name == "auc" else scores.get("at_operating_point", {}).get(name)
    return None if value is None else float(value)


def _precision_recall(probabilities: FloatArray, targets: NDArray[np.int64]) -> dict[str, list[float | None]]:
    """The finding's curve, thinned out; empty for more than two classes."""
    points = None
    if probabilities.shape[1] == 2:
        points = probability_scores.precision_recall_points(probabilities, targets)
    if points is None:
        return {"recall": [], "precision": []}
    kept = np.unique(np.linspace(0, len(points[0]) - 1, _MOST_POINTS).astype(np.int64))
    return {"recall": _rounded(points[0][kept]), "precision": _rounded(points[1][kept])}


def _recalibrated(
    probabilities: FloatArray, targets: NDArray[np.int64], points: Mapping[str, Any]
) -> dict[str, Any]:
    """Calibration after the stored map, beside the one before it."""
    better = recalibrated(probabilities, points)
    bins = metrics.calibration_bins(better, targets)
    return {
        "method": points.get("method", ""),
        "ece": metrics.expected_calibration_error(better, targets),
        "brier": metrics.brier(better, targets),
        "calibration": {
            "mean_predicted": [place.mean_probability for place in bins],
            "fraction_positive": [place.observed for place in bins],
            "count": [place.count for place in bins],
        },
    }


def _rounded(values: FloatArray) -> list[float | None]:
    return [round(float(value), 5) for value in values]


def _listed(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else list(pair)
