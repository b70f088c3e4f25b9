"""Metrics against scikit-learn and by hand."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as theirs

from common.metrics import (
    METRICS,
    auc,
    bootstrap_ci,
    brier,
    calibration_bins,
    classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    roc_points,
)

NAMES = {"auc", "accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1"}


def random_case(seed, *, rows=60, classes=2, ties=True):
    """Probabilities with many ties (a coarse grid) and targets that have every class."""
    random = np.random.default_rng(seed)
    raw = random.integers(1, 6, (rows, classes)) if ties else random.random((rows, classes)) + 0.01
    targets = np.concatenate([np.arange(classes), random.integers(0, classes, rows - classes)])
    return raw / raw.sum(axis=1, keepdims=True), targets


def binary(positive_probabilities):
    positive = np.asarray(positive_probabilities, float)
    return np.stack([1 - positive, positive], axis=1)


def sklearn_metrics(probabilities, targets):
    """The same seven numbers from scikit-learn, for inputs where all are defined."""
    classes = probabilities.shape[1]
    predicted, every = probabilities.argmax(axis=1), list(range(classes))
    if classes == 2:
        average = {"average": "binary"}
        area = theirs.roc_auc_score(targets, probabilities[:, 1])
        specificity = theirs.recall_score(targets, predicted, pos_label=0)
    else:
        average = {"average": "macro", "labels": every, "zero_division": 0}
        area = theirs.roc_auc_score(targets, probabilities, multi_class="ovr", average="macro")
        rest = [theirs.recall_score(targets != label, predicted != label) for label in every]
        specificity = np.mean(rest)
    return {
        "auc": area,
        "accuracy": theirs.accuracy_score(targets, predicted),
        "balanced_accuracy": theirs.balanced_accuracy_score(targets, predicted),
        "precision": theirs.precision_score(targets, predicted, **average),
        "recall": theirs.recall_score(targets, predicted, **average),
        "specificity": specificity,
        "f1": theirs.f1_score(targets, predicted, **average),
    }


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("seed", range(10))
def test_all_metrics_are_scikit_learns(seed, classes, ties):
    probabilities, targets = random_case(seed, classes=classes, ties=ties)
    assert classification_metrics(probabilities, targets) == pytest.approx(
        sklearn_metrics(probabilities, targets), abs=1e-12
    )


def test_metrics_by_hand():
    probabilities, targets = binary([0.4, 0.8, 0.1, 0.6]), np.array([1, 1, 0, 0])
    assert auc(probabilities, targets) == 0.75
    assert classification_metrics(probabilities, targets) == {
        "auc": 0.75,
        "accuracy": 0.5,
        "balanced_accuracy": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "specificity": 0.5,
        "f1": 0.5,
    }
    assert confusion_matrix(probabilities, targets).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("seed", range(3))
def test_confusion_matrix_is_scikit_learns(seed):
    probabilities, targets = random_case(seed, classes=4, ties=False)
    expected = theirs.confusion_matrix(targets, probabilities.argmax(axis=1), labels=range(4))
    np.testing.assert_array_equal(confusion_matrix(probabilities, targets), expected)


def test_a_probability_of_one_half_is_not_called_positive():
    assert confusion_matrix(binary([0.5]), np.array([1])).tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("classes", [2, 3])
def test_without_rows_everything_is_undefined(classes):
    nothing, none = np.zeros((0, classes)), np.zeros(0, np.int64)
    assert classification_metrics(nothing, none) == dict.fromkeys(METRICS, None)
    assert roc_points(nothing, none) is None
    assert brier(nothing, none) is None
    assert expected_calibration_error(nothing, none) is None
    assert calibration_bins(nothing, none) == []
    assert bootstrap_ci(nothing, none)["auc"] is None


def test_one_class_leaves_the_rest_defined():
    scores = classification_metrics(binary([0.9, 0.2]), np.array([1, 1]))
    assert scores.pop("f1") == pytest.approx(2 / 3)
    assert scores == {
        "auc": None,
        "accuracy": 0.5,
        "balanced_accuracy": None,
        "precision": 1.0,
        "recall": 0.5,
        "specificity": None,
    }
    scores = classification_metrics(binary([0.1, 0.2]), np.array([0, 0]))
    assert (scores["recall"], scores["precision"], scores["f1"], scores["specificity"]) == (
        None,
        None,
        None,
        1,
    )
    assert roc_points(binary([0.1, 0.2]), np.array([0, 0])) is None


def test_nothing_called_positive_has_no_precision():
    scores = classification_metrics(binary([0.1, 0.2]), np.array([0, 1]))
    assert (scores["precision"], scores["recall"], scores["f1"]) == (None, 0, 0)


def test_a_class_that_is_never_predicted_counts_as_zero():
    """Leaving it out would reward a model that ignores a rare class."""
    probabilities = np.eye(3)[[0, 0, 1, 1, 0]]
    targets = np.array([0, 0, 1, 1, 2])
    scores = classification_metrics(probabilities, targets)
    predicted = probabilities.argmax(axis=1)
    expected = theirs.precision_score(targets, predicted, average="macro", zero_division=0)
    assert scores["precision"] == pytest.approx(expected)
    assert scores["f1"] == pytest.approx(theirs.f1_score(targets, predicted, average="macro"))


def test_a_missing_class_is_left_out_of_macro_means():
    probabilities, targets = random_case(0, classes=3)
    probabilities, targets = probabilities[targets != 2], targets[targets != 2]
    areas = [theirs.roc_auc_score(targets == label, probabilities[:, label]) for label in (0, 1)]
    scores = classification_metrics(probabilities, targets)
    assert scores["auc"] == pytest.approx(np.mean(areas))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.balanced_accuracy_score(targets, probabilities.argmax(axis=1))
    assert scores["recall"] == scores["balanced_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_diverged_model_has_no_scores(broken):
    probabilities, targets = random_case(0)
    probabilities[3] = broken
    assert classification_metrics(probabilities, targets) == dict.fromkeys(NAMES, None)
    assert auc(probabilities, targets) is None
    assert roc_points(probabilities, targets) is None
    assert brier(probabilities, targets) is None
    assert expected_calibration_error(probabilities, targets) is None
    assert set(bootstrap_ci(probabilities, targets).values()) == {None}


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10), st.integers(2, 4), st.integers(0, 10**6))
def test_every_metric_is_none_or_in_the_unit_interval(rows, classes, seed):
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.ones(classes), size=rows).round(1)
    targets = random.integers(0, classes, rows)
    scores = classification_metrics(probabilities, targets)
    assert scores.keys() == NAMES == set(METRICS)
    assert all(value is None or 0 <= value <= 1 for value in scores.values())
    assert all(value is None or type(value) is float for value in scores.values())


@pytest.mark.parametrize(
    ("probabilities", "targets"),
    [
        (np.zeros(3), np.zeros(3, np.int64)),
        (np.zeros((3, 1)), np.zeros(3, np.int64)),
        (np.zeros((3, 2)), np.zeros(2, np.int64)),
        (np.zeros((3, 2)), np.zeros((3, 1), np.int64)),
        (np.zeros((3, 2)), np.array([0, 1, 2])),
        (np.zeros((3, 2)), np.array([0, 1, -1])),
    ],
)
def test_wrong_shapes_and_labels_are_refused(probabilities, targets):
    for function in (auc, classification_metrics, confusion_matrix, roc_points, brier, bootstrap_ci):
        with pytest.raises(ValueError, match=r"expected probabilities|targets must lie"):
            function(probabilities, targets)


def test_roc_points_are_scikit_learns_and_enclose_the_auc():
    probabilities, targets = random_case(1)
    false_positive_rate, true_positive_rate = roc_points(probabilities, targets)
    assert (false_positive_rate[0], true_positive_rate[0]) == (0, 0)
    assert (false_positive_rate[-1], true_positive_rate[-1]) == (1, 1)
    area = np.trapezoid(true_positive_rate, false_positive_rate)
    assert area == pytest.approx(auc(probabilities, targets))


def test_roc_points_of_a_named_class():
    probabilities, targets = random_case(1, classes=3)
    false_positive_rate, true_positive_rate = roc_points(probabilities, targets, positive=0)
    expected = theirs.roc_auc_score(targets == 0, probabilities[:, 0])
    assert np.trapezoid(true_positive_rate, false_positive_rate) == pytest.approx(expected)


def test_calibration_by_hand():
    probabilities, targets = binary([0.0, 0.1, 0.15, 0.2, 1.0]), np.array([0, 1, 0, 1, 1])
    first, second, last = calibration_bins(probabilities, targets)
    assert (first.lower, first.upper, first.count) == (0, 0.1, 2)
    assert (first.mean_probability, first.observed) == (0.05, 0.5)
    assert (second.count, second.observed) == (2, 0.5)
    assert second.mean_probability == pytest.approx(0.175)
    assert (last.count, last.mean_probability, last.observed) == (1, 1, 1)
    assert expected_calibration_error(probabilities, targets) == pytest.approx((2 * 0.45 + 2 * 0.325) / 5)


def test_calibration_is_scikit_learns():
    from sklearn.calibration import calibration_curve

    probabilities, targets = random_case(4, rows=500, ties=False)
    observed, said = calibration_curve(targets, probabilities[:, 1], n_bins=10)
    bins = calibration_bins(probabilities, targets)
    np.testing.assert_allclose([place.observed for place in bins], observed)
    np.testing.assert_allclose([place.mean_probability for place in bins], said)
    assert sum(place.count for place in bins) == 500


def test_calibration_of_more_classes_asks_about_the_predicted_one():
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    (place,) = calibration_bins(probabilities, np.array([0, 2]))
    assert (place.count, place.observed) == (2, 0.5)
    assert expected_calibration_error(probabilities, np.array([0, 2])) == pytest.approx(0.3)


@pytest.mark.parametrize("seed", range(3))
def test_brier_is_scikit_learns(seed):
    probabilities, targets = random_case(seed, classes=2)
    assert brier(probabilities, targets) == pytest.approx(
        theirs.brier_score_loss(targets, probabilities[:, 1])
    )
    probabilities, targets = random_case(seed, classes=3)
    expected = np.mean(np.sum((probabilities - np.eye(3)[targets]) ** 2, axis=1))
    assert brier(probabilities, targets) == pytest.approx(expected)
