"""What the simulation says of held-back patients in other tasks, and how it deals them out."""

import numpy as np
import pytest

from common.multi_label_metrics import finding_metrics
from common.tasks import make_task
from simulations.comparison import SCORES, interval_of, score
from simulations.partition import majority_labels
from simulations.task_scoring import task_evaluation

TASKS = {"multi-label": ("a", "b", "c"), "ordinal": ("none", "mild", "severe")}


def rows_of(name, rows=80):
    random, task = np.random.default_rng(0), make_task(name, TASKS[name])
    targets = random.integers(0, task.target_values, (rows, *task.target_shape))
    outputs = random.standard_normal((rows, task.num_outputs))
    outputs += 2 * (targets if targets.ndim == 2 else targets[:, None]) - 1
    return task, task.probabilities(outputs), targets, np.arange(rows) // 2


@pytest.mark.parametrize("name", list(TASKS))
def test_scores_come_with_intervals_and_each_question_by_itself(name):
    task, said, targets, patients = rows_of(name)
    found = task_evaluation(task, said, targets, patients, seed=3)
    assert found["metrics"] == task.metrics(said, targets)
    low, high = found["ci95"]["auc"]
    assert low < found["metrics"]["auc"] < high
    assert (found["images"], found["patients"]) == (80, 40)
    if name == "multi-label":
        assert list(found["per_class"]) == ["a", "b", "c"]
        expected = finding_metrics(said, targets, task.classes)["b"] | {
            "images_with": int(targets[:, 1].sum())
        }
        assert found["per_class"]["b"] == expected
        assert found["confusion"] is None
    else:
        assert list(found["per_class"]) == ["beyond none", "beyond mild"]
        assert np.sum(found["confusion"]) == 80
    assert set(found["roc"]) == set(found["per_class"])


@pytest.mark.parametrize("name", list(TASKS))
def test_a_comparison_has_no_score_that_the_task_does_not_have(name):
    task, said, targets, patients = rows_of(name)
    scores, samples = score(said, targets, patients, seed=0, task=task)
    assert set(scores) == set(samples) == set(SCORES)
    assert scores["auc"] == task.metrics(said, targets)["auc"]
    assert interval_of(samples["auc"]) is not None
    assert scores["recall"] is None
    assert interval_of(samples["recall"]) is None


def test_units_are_dealt_out_by_the_findings_that_half_of_their_images_show():
    targets = np.array([[1, 0], [0, 0], [0, 1], [1, 0], [0, 0]])
    labels = majority_labels(targets, np.array([0, 0, 1, 2, 3]), num_units=4)
    assert labels[0] == labels[2]
    assert len(set(labels.tolist())) == 3
