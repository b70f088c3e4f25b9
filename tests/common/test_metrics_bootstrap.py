"""The bootstrap by patient against a slow loop."""

import math
import time

import numpy as np
import pytest

from common.metrics import METRICS, auc, bootstrap_ci, classification_metrics


def random_case(seed, *, rows=60, classes=2):
    """Random probabilities, and targets that have every class."""
    random = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(classes), random.integers(0, classes, rows - classes)])
    return random.dirichlet(np.ones(classes), size=rows), targets


def binary(positive_probabilities):
    positive = np.asarray(positive_probabilities, float)
    return np.stack([1 - positive, positive], axis=1)


def slow_bootstrap(probabilities, targets, units, *, resamples, seed):
    """Draw patients, copy their rows, score with `classification_metrics`."""
    names = np.unique(units)
    rows_of = [np.flatnonzero(units == name) for name in names]
    random = np.random.Generator(np.random.PCG64(seed))
    drawn = random.integers(len(names), size=(resamples, len(names)))
    samples = [np.concatenate([rows_of[unit] for unit in one]) for one in drawn]
    scores = [classification_metrics(probabilities[rows], targets[rows]) for rows in samples]
    return {name: [score[name] for score in scores] for name in METRICS}


@pytest.mark.parametrize(("classes", "entries"), [(2, 4_000_000), (2, 700), (3, 4_000_000)])
def test_bootstrap_is_the_slow_loop(classes, entries, monkeypatch):
    monkeypatch.setattr("common.metrics._ENTRIES_AT_ONCE", entries)
    probabilities, targets = random_case(3, classes=classes)
    probabilities = probabilities.round(1)  # with ties
    units = np.random.default_rng(0).integers(0, 25, 60) * 7 - 30
    intervals = bootstrap_ci(probabilities, targets, units=units, metrics=METRICS, resamples=80, seed=4)
    slow = slow_bootstrap(probabilities, targets, units, resamples=80, seed=4)
    for name in METRICS:
        assert intervals[name] == pytest.approx(tuple(np.quantile(slow[name], [0.025, 0.975])), abs=1e-12), (
            name
        )


def test_patients_with_many_images_widen_the_interval():
    """Twenty copies of each image carry no new evidence; counted as patients they do not pretend to."""
    probabilities, targets = random_case(5, rows=40)
    copies = np.repeat(np.arange(40), 20)
    low, high = bootstrap_ci(probabilities, targets)["auc"]
    by_patient = bootstrap_ci(probabilities[copies], targets[copies], units=copies)["auc"]
    by_image = bootstrap_ci(probabilities[copies], targets[copies])["auc"]
    assert by_patient == pytest.approx((low, high))
    assert by_image[1] - by_image[0] < 0.5 * (high - low)


def test_bootstrap_is_the_same_for_the_same_seed():
    probabilities, targets = random_case(6)
    first = bootstrap_ci(probabilities, targets, seed=1)
    assert first == bootstrap_ci(probabilities, targets, seed=1)
    assert first != bootstrap_ci(probabilities, targets, seed=2)
    low, high = bootstrap_ci(probabilities, targets, seed=1, confidence=0.5)["auc"]
    assert first["auc"][0] < low < auc(probabilities, targets) < high < first["auc"][1]


def test_bootstrap_says_nothing_where_too_few_resamples_are_defined():
    targets = np.array([1] + [0] * 20)
    intervals = bootstrap_ci(binary(np.linspace(0.1, 0.9, 21)), targets)
    assert intervals["auc"] is None  # the only finding is missing in a third of the resamples
    assert intervals["recall"] is None
    assert intervals["accuracy"] is not None


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    random, hits = np.random.default_rng(0), 0
    for _ in range(200):
        targets = (random.random(150) < 0.5).astype(np.int64)
        right = random.random(150) < 0.8
        low, high = bootstrap_ci(
            binary(np.where(right, targets, 1 - targets)), targets, metrics=["accuracy"], resamples=400
        )["accuracy"]
        hits += low <= 0.8 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_bootstrap_of_624_patients_takes_under_three_seconds():
    probabilities, targets = random_case(0, rows=624)
    started = time.process_time()
    intervals = bootstrap_ci(probabilities, targets)
    assert time.process_time() - started < 3
    assert all(low < high and math.isfinite(low + high) for low, high in intervals.values())


@pytest.mark.parametrize("bad", [{"metrics": ["auroc"]}, {"resamples": 0}, {"confidence": 1.0}])
def test_bootstrap_refuses_nonsense(bad):
    with pytest.raises(ValueError, match="cannot bootstrap"):
        bootstrap_ci(*random_case(0), **bad)
