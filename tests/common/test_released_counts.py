"""Metrics from released counts, against scikit-learn's on the very scores, and how far noise moves them."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from common.evaluation import KINDS, ROUNDING_VARIANCE, CountPlan, count_patients, noised
from common.metrics import METRICS, classification_metrics
from common.privacy.randomness import ReproducibleRandomness
from common.released_counts import (
    ReleasedCounts,
    calibration,
    metrics_of,
    noise_of_metrics,
    operating_point,
)


def some_scores(classes, *, rows=3000, seed=0):
    random = np.random.default_rng(seed)
    targets = random.integers(classes, size=rows)
    logits = random.normal(size=(rows, classes))
    logits[np.arange(rows), targets] += 1.5
    said = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return said, targets


def released_from(said, targets, *, bins=10, noise_multiplier=0.0, draw=0, kinds=KINDS):
    classes = said.shape[1]
    plan = CountPlan.of(kinds, classes=classes, score_bins=bins)
    counts = count_patients(plan, said, targets)
    variance = 0.0
    if noise_multiplier:
        stream = ReproducibleRandomness(draw, "north").stream(purpose="evaluation", round_number=1, step=0)
        counts = noised(plan, counts, noise_multiplier=noise_multiplier, stream=stream)
        variance = plan.noise_stddev(noise_multiplier) ** 2 + ROUNDING_VARIANCE
    return ReleasedCounts(
        classes=classes, score_bins=bins, counts=counts, noise_variance=dict.fromkeys(kinds, variance)
    )


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_without_noise_they_are_scikit_learns(classes):
    said, targets = some_scores(classes)
    found = metrics_of(released_from(said, targets, bins=100))
    called = said.argmax(axis=1)
    average = {"average": "binary" if classes == 2 else "macro"}
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(targets, called))
    assert found["recall"] == pytest.approx(sklearn_metrics.recall_score(targets, called, **average))
    assert found["precision"] == pytest.approx(sklearn_metrics.precision_score(targets, called, **average))
    assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(targets, called, **average))
    balanced = sklearn_metrics.balanced_accuracy_score(targets, called)
    assert found["balanced_accuracy"] == pytest.approx(balanced)
    area = (
        sklearn_metrics.roc_auc_score(targets, said[:, 1])
        if classes == 2
        else sklearn_metrics.roc_auc_score(targets, said, multi_class="ovr")
    )
    assert found["auc"] == pytest.approx(area, abs=0.003)
    assert found["specificity"] == pytest.approx(classification_metrics(said, targets)["specificity"])


@pytest.mark.parametrize("classes", [2, 4])
def test_the_auc_is_off_by_at_most_half_the_pairs_within_a_bin(classes):
    said, targets = some_scores(classes)
    for bins in (2, 5, 20):
        released = released_from(said, targets, bins=bins)
        histograms = released.array("scores")
        shares = histograms / histograms.sum(axis=2, keepdims=True)
        bound = (shares[:, 0] * shares[:, 1]).sum(axis=1).mean() / 2
        exact = classification_metrics(said, targets)["auc"]
        assert abs(metrics_of(released)["auc"] - exact) <= bound + 1e-12


def test_a_class_that_is_never_predicted_counts_as_in_the_exact_metrics():
    said, targets = some_scores(3)
    said[:, 1] = 0.0
    exact = classification_metrics(said, targets)
    found = metrics_of(released_from(said, targets, bins=100))
    assert found["precision"] == pytest.approx(exact["precision"])
    assert found["f1"] == pytest.approx(exact["f1"])


@pytest.mark.parametrize("classes", [2, 4])
def test_the_stated_noise_is_the_spread_over_fresh_noise(classes):
    said, targets = some_scores(classes)
    runs = [released_from(said, targets, noise_multiplier=8.0, draw=draw) for draw in range(300)]
    values = [metrics_of(one) for one in runs]
    stated = [noise_of_metrics(one) for one in runs[:20]]
    exact = metrics_of(released_from(said, targets))
    for name in METRICS:
        spread = np.std([value[name] for value in values])
        assert np.mean([one[name] for one in stated]) == pytest.approx(spread, rel=0.25), name
        assert np.mean([value[name] for value in values]) == pytest.approx(exact[name], abs=spread / 2), name


def test_without_noise_none_is_stated():
    released = released_from(*some_scores(2))
    assert noise_of_metrics(released) == dict.fromkeys(METRICS, 0.0)


def test_noise_alone_is_no_metric():
    """Hospitals without validation patients: two deviations let a number through one time in forty."""
    nobody = np.zeros((0, 2)), np.zeros(0, dtype=np.int64)
    found = [metrics_of(released_from(*nobody, noise_multiplier=3.0, draw=draw)) for draw in range(200)]
    for name in METRICS:
        assert sum(one[name] is not None for one in found) < 20, name


def test_what_was_not_released_is_none():
    said, targets = some_scores(2)
    counts = metrics_of(released_from(said, targets, kinds=("confusion",)))
    assert counts["auc"] is None
    assert counts["accuracy"] is not None
    scores = metrics_of(released_from(said, targets, kinds=("scores",)))
    assert scores["auc"] is not None
    assert {value for name, value in scores.items() if name != "auc"} == {None}
    nothing = ReleasedCounts(classes=2, score_bins=10)
    assert metrics_of(nothing) == noise_of_metrics(nothing) == dict.fromkeys(METRICS, None)


def test_scores_stay_within_bounds_whatever_the_noise():
    said, targets = some_scores(2, rows=60)
    for draw in range(100):
        found = metrics_of(released_from(said, targets, noise_multiplier=4.0, draw=draw))
        assert all(value is None or 0 <= value <= 1 for value in found.values())


def test_the_operating_point_is_the_best_bin_edge():
    said, targets = some_scores(2)
    said = np.column_stack([1 - said[:, 1] ** 3, said[:, 1] ** 3])  # far from calibrated
    point = operating_point(released_from(said, targets, bins=20))
    youden = {
        edge / 20: np.mean(said[targets == 1, 1] >= edge / 20) - np.mean(said[targets == 0, 1] >= edge / 20)
        for edge in range(1, 20)
    }
    assert point["threshold"] == max(youden, key=youden.get)
    assert point["sensitivity"] + point["specificity"] - 1 == pytest.approx(max(youden.values()))
    assert point["threshold"] < 0.5


def test_there_is_no_operating_point_for_noise_or_several_classes():
    random = np.random.default_rng(0)
    guesses = random.random(200)
    guessed = np.column_stack([1 - guesses, guesses]), random.integers(2, size=200)
    assert operating_point(released_from(*guessed, noise_multiplier=8.0)) is None
    assert operating_point(released_from(*some_scores(3))) is None
    assert operating_point(ReleasedCounts(classes=2, score_bins=10)) is None


def test_the_calibration_table_says_how_often_it_was_so():
    said, targets = some_scores(2)
    table = calibration(released_from(said, targets, bins=5))
    for row in table:
        within = (said[:, 1] >= row["lower"]) & (said[:, 1] < row["upper"])
        assert row["patients"] == within.sum()
        assert row["observed"] == pytest.approx(targets[within].mean())
    nobody = np.zeros((0, 2)), np.zeros(0, dtype=np.int64)
    assert calibration(released_from(*nobody, noise_multiplier=3.0)) == []
    assert calibration(released_from(*some_scores(3))) == []
