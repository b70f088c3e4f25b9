"""Average precision, Brier score, calibration error and the ROC band against scikit-learn, draw by draw."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from common.metrics import expected_calibration_error
from common.probability_scores import (
    PROBABILITY_SCORES,
    average_precision,
    precision_recall_points,
    probability_intervals,
    probability_scores,
    roc_band,
)


def some_case(classes=2, *, rows=90, seed=0):
    random = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(classes), random.integers(0, classes, rows - classes)])
    said = random.dirichlet(np.ones(classes), size=rows).round(2)
    said[:, -1] = 1 - said[:, :-1].sum(axis=1)
    return said, targets


def sklearn_brier(said, targets):
    if said.shape[1] == 2:
        return sklearn_metrics.brier_score_loss(targets, said[:, 1])
    return sum(sklearn_metrics.brier_score_loss(targets == c, said[:, c]) for c in range(said.shape[1]))


def sklearn_precision(said, targets):
    classes = [1] if said.shape[1] == 2 else range(said.shape[1])
    return np.mean([sklearn_metrics.average_precision_score(targets == c, said[:, c]) for c in classes])


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_they_are_scikit_learns(classes):
    said, targets = some_case(classes)
    found = probability_scores(said, targets)
    assert set(found) == set(PROBABILITY_SCORES)
    assert found["average_precision"] == pytest.approx(sklearn_precision(said, targets))
    assert found["brier"] == pytest.approx(sklearn_brier(said, targets))
    assert found["ece"] == expected_calibration_error(said, targets)


def test_average_precision_by_hand():
    # From the top: hit, miss, hit: precision 1 at recall 1/2 and 2/3 at recall 1.
    said = np.array([[0.1, 0.9], [0.3, 0.7], [0.6, 0.4]])
    assert average_precision(said, np.array([1, 0, 1])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(said, np.zeros(3, np.int64)) is None
    assert average_precision(said[:0], np.zeros(0, np.int64)) is None
    assert average_precision(np.full((3, 2), np.nan), np.array([1, 0, 1])) is None


def test_the_precision_recall_curve_starts_without_recall_and_holds_the_area():
    said, targets = some_case()
    recall, precision = precision_recall_points(said, targets)
    assert recall[0] == 0.0
    assert recall[-1] == 1.0
    assert (np.diff(recall) >= 0).all()
    area = float((np.diff(recall) * precision[1:]).sum())
    assert area == pytest.approx(average_precision(said, targets))
    assert precision_recall_points(said, np.zeros(len(said), np.int64)) is None


@pytest.mark.parametrize(("classes", "entries"), [(2, 4_000_000), (2, 900), (3, 4_000_000)])
def test_the_intervals_are_those_of_a_loop_over_drawn_patients(classes, entries, monkeypatch):
    monkeypatch.setattr("common.metrics._ENTRIES_AT_ONCE", entries)
    said, targets = some_case(classes)
    units = np.random.default_rng(1).integers(0, 40, len(targets))
    found = probability_intervals(said, targets, units=units, resamples=60, seed=4)
    names = np.unique(units)
    drawn = np.random.Generator(np.random.PCG64(4)).integers(len(names), size=(60, len(names)))
    samples = [np.concatenate([np.flatnonzero(units == names[unit]) for unit in one]) for one in drawn]
    scorers = {
        "average_precision": sklearn_precision, "brier": sklearn_brier, "ece": expected_calibration_error
    }  # fmt: skip
    for name, score in scorers.items():
        values = [score(said[rows], targets[rows]) for rows in samples]
        assert found[name] == pytest.approx(tuple(np.quantile(values, [0.025, 0.975]))), name


def test_a_model_that_diverged_has_no_intervals():
    said, targets = some_case()
    said[3] = np.nan
    assert probability_intervals(said, targets) == dict.fromkeys(PROBABILITY_SCORES, None)
    assert roc_band(said, targets, grid=np.linspace(0, 1, 5)) is None


def test_the_roc_band_is_that_of_scikit_learns_curves():
    said, targets = some_case(rows=150)
    grid = np.linspace(0, 1, 11)
    low, high = roc_band(said, targets, grid=grid, resamples=40, seed=2)
    drawn = np.random.Generator(np.random.PCG64(2)).integers(150, size=(40, 150))
    curves = []
    for rows in drawn:
        rates = sklearn_metrics.roc_curve(targets[rows], said[rows, 1], drop_intermediate=False)[:2]
        # Upper end of each vertical piece, then straight lines between.
        tops = {x: y for x, y in zip(*rates, strict=True)}
        curves.append(np.interp(grid, list(tops), list(tops.values())))
    expected = np.quantile(curves, [0.025, 0.975], axis=0)
    np.testing.assert_allclose([low, high], expected, atol=1e-12)
    assert (low <= high).all()
    assert (high - low).max() > 0.05
