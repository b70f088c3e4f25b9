"""Classical classifiers: probabilities, absent classes, patients on one side of a calibration, repetition."""

import numpy as np
import pytest

from common.metrics import auc
from common.tasks import make_task
from simulations.baselines import classifiers
from simulations.baselines.classifiers import METHODS, SVM, fitted_probabilities

each_method = pytest.mark.parametrize("method", METHODS)


def clouds(targets, *, rng, width=6):
    """Feature `label` is higher in rows of that label."""
    features = rng.normal(size=(len(targets), width))
    features[np.arange(len(targets)), targets] += 2.5
    return features.astype(np.float32)


def ask(method, targets, *, task="classification", classes=3, seed=0, units=None, features=None):
    rng = np.random.default_rng(1)
    asked_about = rng.integers(classes, size=90)
    made = clouds(targets, rng=np.random.default_rng(2)) if features is None else features
    said = fitted_probabilities(
        method,
        make_task(task, [f"class {k}" for k in range(classes)]),
        features=made,
        targets=targets,
        units=np.arange(len(targets)) // 2 if units is None else units,
        asked=clouds(asked_about, rng=rng),
        seed=seed,
    )
    return said, asked_about


@each_method
@pytest.mark.parametrize("classes", [2, 3])
def test_what_can_be_learned_is_learned_and_the_same_again(method, classes):
    targets = np.random.default_rng(0).integers(classes, size=150)
    said, truth = ask(method, targets, classes=classes)
    assert said.shape == (90, classes)
    np.testing.assert_allclose(said.sum(axis=1), 1, rtol=1e-6)
    assert auc(said, truth) > 0.9
    assert np.array_equal(said, ask(method, targets, classes=classes)[0])


@each_method
def test_a_class_that_nobody_has_gets_probability_zero(method):
    targets = np.tile([0, 2], 30)
    said, _ = ask(method, targets)
    assert (said[:, 1] == 0).all()
    np.testing.assert_allclose(said.sum(axis=1), 1, rtol=1e-6)
    only, _ = ask(method, np.ones(5, np.int64))
    assert (only == [0, 1, 0]).all()


@each_method
def test_a_class_with_one_patient_is_no_fault(method):
    said, _ = ask(method, np.array([0] * 20 + [1] * 20 + [2]))
    assert np.isfinite(said).all()
    np.testing.assert_allclose(said.sum(axis=1), 1, rtol=1e-6)


@each_method
def test_findings_are_asked_one_by_one(method):
    rng = np.random.default_rng(3)
    targets = rng.integers(2, size=(120, 3))
    targets[:, 2] = 0
    features = rng.normal(size=(120, 6)).astype(np.float32)
    features[:, :3] += 2.5 * targets
    said, truth = ask(method, targets, task="multi-label", features=features)
    assert (said[:, 2] == 0).all()
    assert auc(np.stack([1 - said[:, 0], said[:, 0]], axis=1), (truth == 0).astype(np.int64)) > 0.9
    assert ((said >= 0) & (said <= 1)).all()


def test_ordered_levels_are_taken_as_classes():
    targets = np.random.default_rng(0).integers(3, size=90)
    as_levels, _ = ask("logistic regression", targets, task="ordinal")
    assert np.array_equal(as_levels, ask("logistic regression", targets)[0])


def test_calibration_keeps_a_patient_on_one_side():
    rng = np.random.default_rng(0)
    labels, units = rng.integers(2, size=120), np.arange(120) // 4
    folds = classifiers._folds_of_patients(labels, units, seed=0)
    assert len(folds) == 3
    for learned, calibrated in folds:
        assert not set(units[learned]) & set(units[calibrated])
        assert len(learned) + len(calibrated) == 120
        assert len(calibrated) > 20


def test_calibrated_svm_is_not_too_sure_of_noise():
    rng = np.random.default_rng(5)
    targets = rng.integers(2, size=200)
    features = rng.normal(size=(200, 6)).astype(np.float32)
    said, _ = ask(SVM, targets, classes=2, features=features)
    # The machine tells its own training rows apart; a sigmoid on those would be sure of anything.
    assert np.abs(said - targets.mean()).mean() < 0.6
    assert (said.max(axis=1) < 0.75).all()


def test_an_svm_of_many_rows_learns_from_some(monkeypatch):
    monkeypatch.setattr(classifiers, "MOST_SVM_ROWS", 60)
    targets = np.random.default_rng(0).integers(2, size=150)
    said, truth = ask(SVM, targets, classes=2)
    assert auc(said, truth) > 0.9
    assert np.array_equal(said, ask(SVM, targets, classes=2)[0])
