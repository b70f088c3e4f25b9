"""Several findings and ordered levels: probabilities, scores, sums whose sensitivity is tried by force."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    cohen_kappa_score,
    f1_score,
    hamming_loss,
    mean_absolute_error,
    roc_auc_score,
)

from common.config import FederationConfig
from common.errors import ConfigError
from common.evaluation import CountPlan, count_patients, patient_labels
from common.multi_label_metrics import finding_metrics, multi_label_metrics
from common.ordinal_metrics import beyond, levels_of, ordinal_metrics
from common.released_counts import ReleasedCounts, finding_points, metrics_of
from common.settings import from_flat, parse, to_flat
from common.tasks import make_task, task_of

FINDINGS, LEVELS = ("edema", "effusion", "mass"), ("none", "mild", "moderate", "severe")
TASKS = {"multi-label": FINDINGS, "ordinal": LEVELS, "classification": LEVELS}


def rows_of(name, rows, *, seed=0):
    """Probabilities and targets of random records."""
    random, task = np.random.default_rng(seed), make_task(name, TASKS[name])
    outputs = 2 * random.standard_normal((rows, task.num_outputs))
    targets = random.integers(0, task.target_values, (rows, *task.target_shape))
    return task, task.probabilities(outputs), targets


def test_findings_are_independent_sigmoids():
    task = make_task("multi-label", FINDINGS)
    outputs = np.array([[0.0, 3.0, -3.0], [np.nan, 0.0, 0.0], [800.0, -800.0, 0.0]])
    said = task.probabilities(torch.from_numpy(outputs))
    np.testing.assert_allclose(said[[0, 2]], expit(outputs[[0, 2]]))
    assert np.isnan(said[1]).all()
    assert (task.num_outputs, task.target_shape, task.target_values) == (3, (3,), 2)


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_levels_are_consistent_whatever_the_network_says(scale):
    task = make_task("ordinal", LEVELS)
    outputs = scale * np.random.default_rng(0).standard_normal((200, 3))
    said = task.probabilities(outputs)
    assert (said >= 0).all()
    np.testing.assert_allclose(said.sum(axis=1), 1, atol=1e-12)
    assert (np.diff(beyond(said), axis=1) <= 1e-12).all()
    assert (task.num_outputs, task.target_shape, task.target_values) == (3, (), 4)


def test_ordinal_losses_and_probabilities_are_of_one_model():
    """The mean entropy of "beyond level k", computed from the probabilities that are stated."""
    task = make_task("ordinal", LEVELS)
    outputs, targets = torch.randn(30, 3, dtype=torch.float64), torch.arange(30) % 4
    there = targets[:, None].numpy() > np.arange(3)
    said = beyond(task.probabilities(outputs))
    expected = -np.log(np.where(there, said, 1 - said)).mean(axis=1)
    np.testing.assert_allclose(task.losses(outputs, targets), expected, rtol=1e-9)
    assert levels_of(np.array([[0.3, 0.3, 0.4]])).tolist() == [1]


def test_scores_of_findings_are_scikit_learns():
    _, said, there = rows_of("multi-label", 300)
    called = said > 0.5
    found = multi_label_metrics(said, there)
    expected = {
        "auc": roc_auc_score(there, said, average="macro"),
        "average_precision": average_precision_score(there, said, average="macro"),
        "f1": f1_score(there, called, average="macro"),
        "exact_match": accuracy_score(there, called),
        "hamming_loss": hamming_loss(there, called),
    }
    assert found == pytest.approx(expected)
    each = finding_metrics(said, there, FINDINGS)
    assert each["mass"]["auc"] == pytest.approx(roc_auc_score(there[:, 2], said[:, 2]))


def test_scores_of_levels_are_scikit_learns():
    _, said, targets = rows_of("ordinal", 300)
    decided, found = levels_of(said), ordinal_metrics(said, targets)
    assert found["quadratic_kappa"] == pytest.approx(cohen_kappa_score(targets, decided, weights="quadratic"))
    assert found["mae"] == pytest.approx(mean_absolute_error(targets, decided))
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, decided))
    areas = [roc_auc_score(targets > k, beyond(said)[:, k]) for k in range(3)]
    assert found["auc"] == pytest.approx(np.mean(areas))


@pytest.mark.parametrize("name", ["multi-label", "ordinal"])
def test_scores_without_rows_or_of_a_diverged_model_are_undefined(name):
    task, said, targets = rows_of(name, 5)
    assert set(task.metrics(said[:0], targets[:0]).values()) == {None}
    assert set(task.metrics(np.full_like(said, np.nan), targets).values()) == {None}
    with pytest.raises(ValueError, match="expected"):
        task.metrics(said, targets[:3])


@pytest.mark.parametrize("name", ["multi-label", "ordinal"])
def test_no_unit_moves_a_bounded_sum_by_more_than_its_sensitivity(name):
    """By force: random units of random sizes, extreme and diverged ones too, each taken away in turn."""
    random, reached = np.random.default_rng(1), {}
    for trial in range(30):
        task, said, targets = rows_of(name, 24, seed=trial)
        said[random.random(said.shape) < 0.2] = random.choice([0.0, 1.0])
        said[0] = np.nan
        if trial % 3 == 0:
            targets[:] = task.target_values - 1
        units = random.integers(0, 6, 24)
        units[:6] = range(6)
        whole = task.bounded_sums(said, targets, units=units)
        for unit in range(6):
            kept = units != unit
            renumbered = np.unique(units[kept], return_inverse=True)[1]
            rest = task.bounded_sums(said[kept], targets[kept], units=renumbered)
            for key, total in whole.items():
                moved = np.abs(np.subtract(total.value, rest[key].value)).sum()
                assert moved <= total.sensitivity + 1e-9, key
                reached[key] = max(reached.get(key, 0.0), moved / total.sensitivity)
    assert reached["count"] == pytest.approx(1)
    assert reached["targets"] == pytest.approx(1), "the bound is not reached, so it may be too large"


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("kinds", [("confusion",), ("scores",), ("confusion", "scores")])
def test_no_patient_moves_released_counts_by_more_than_the_stated_sensitivity(name, kinds):
    plan = CountPlan.of(kinds, classes=len(TASKS[name]), score_bins=7, task=name)
    largest = 0.0
    for trial in range(20):
        _, said, targets = rows_of(name, 15, seed=trial)
        said[0], said[1] = np.nan, 1.0
        whole = np.concatenate([count for count in count_patients(plan, said, targets).values()])
        assert len(whole) == sum(map(plan.length, plan.kinds))
        for left in range(15):
            kept = np.arange(15) != left
            rest = np.concatenate([*count_patients(plan, said[kept], targets[kept]).values()])
            largest = max(largest, float(np.linalg.norm(whole - rest)))
    assert largest == pytest.approx(plan.l2_sensitivity)


def test_released_counts_tell_the_scores_of_exact_data():
    for name, same in (
        ("multi-label", ("f1", "hamming_loss")),
        ("ordinal", ("quadratic_kappa", "mae", "accuracy")),
    ):
        task, said, targets = rows_of(name, 2000)
        plan = CountPlan.of(("confusion", "scores"), classes=len(TASKS[name]), score_bins=100, task=name)
        counts = count_patients(plan, said, targets)
        released = ReleasedCounts(classes=plan.classes, score_bins=100, counts=counts, task=name)
        told, exact = metrics_of(released), task.metrics(said, targets)
        assert {key: told[key] for key in same} == pytest.approx({key: exact[key] for key in same})
        assert told["auc"] == pytest.approx(exact["auc"], abs=0.01)
        assert set(told) <= set(exact), "nothing is told that the counts cannot tell"


def test_each_finding_has_an_operating_point_of_its_own():
    random = np.random.default_rng(0)
    there = random.integers(0, 2, (4000, 2))
    said = np.clip(random.normal(0.2 + 0.2 * there + [[0.0, 0.5]], 0.05), 0, 1)
    plan = CountPlan.of(("scores",), classes=2, score_bins=20, task="multi-label")
    counts = count_patients(plan, said, there)
    released = ReleasedCounts(classes=2, score_bins=20, counts=counts, task="multi-label")
    first, second = finding_points(released)
    assert first["threshold"] == pytest.approx(0.3)
    assert second["threshold"] == pytest.approx(0.8)


def test_a_patient_has_a_finding_that_half_of_the_images_show():
    targets = np.array([[1, 0, 1], [0, 0, 1], [0, 1, 0]])
    labels = patient_labels(targets, np.array([0, 0, 1]), num_patients=3, classes=3)
    assert labels.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": {"task": "multi-label"}}, "training.loss = 'bce'"),
        ({"data": {"task": "ordinal"}, "training": {"loss": "cross-entropy"}}, "'focal'"),
        ({"training": {"class-weights": [1.0]}}, "1 numbers for 2 classes"),
        ({"training": {"class-weights": [1.0, 0.0]}}, "above 0"),
        ({"federation": {"private": False}, "training": {"optimizer": "adam-bc"}}, "without privacy"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        parse(FederationConfig, settings, source="test")


def test_the_plan_decides_task_loss_weights_and_width():
    settings = {
        "data": {"task": "ordinal", "classes": list(LEVELS)},
        "training": {"loss": "focal", "focal-gamma": 1.5, "class-weights": [1, 2, 3, 4]},
    }
    config = parse(FederationConfig, settings, source="test")
    assert from_flat(FederationConfig, to_flat(config)) == config
    task = task_of(config.public_plan)
    assert (task.name, task.loss, task.focal_gamma) == ("ordinal", "focal", 1.5)
    assert task.class_weights == (1, 2, 3, 4)
    assert config.model_spec.num_outputs == 3
    with pytest.raises(ConfigError, match="at least two distinct"):
        make_task("ordinal", ["a", "a"])
