"""What a reviewer asks of the final model: against scikit-learn, at the threshold that the run has stored."""

import json

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from simulations.assessment import (
    RATES,
    assessment,
    at_threshold,
    decisions,
    of_hospital,
    threshold_curve,
    worst_hospital,
)
from simulations.held_back import HeldBack, ScoredSet, read_held_back, write_held_back

POINT = {"threshold": 0.3, "source": "noised validation counts"}
POINTS = {"method": "isotonic", "said": [0.1, 0.5, 0.9], "so": [0.0, 0.6, 1.0]}


@pytest.fixture(scope="module")
def case():
    random = np.random.default_rng(0)
    targets = random.integers(2, size=240)
    said = np.clip(0.25 * targets + 0.75 * random.random(240), 0, 1)
    scored = ScoredSet(
        inputs={"image": np.zeros((240, 1, 8, 8), np.uint8)},
        targets=targets,
        units=random.integers(0, 120, size=240),
        hospitals=np.repeat([0, 1], 120),
        strata={"sex": random.integers(2, size=240)},
    )
    return np.stack([1 - said, said], axis=1), scored


def test_at_the_operating_point_the_scores_are_scikit_learns(case):
    probabilities, scored = case
    found = at_threshold(probabilities, scored, point=POINT, seed=0)
    called, targets = probabilities[:, 1] >= 0.3, scored.targets
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(targets, called),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(targets, called),
        "precision": sklearn_metrics.precision_score(targets, called),
        "recall": sklearn_metrics.recall_score(targets, called),
        "specificity": sklearn_metrics.recall_score(targets, called, pos_label=0),
        "f1": sklearn_metrics.f1_score(targets, called),
    }
    assert found["metrics"] == pytest.approx(expected)
    assert found["confusion"] == sklearn_metrics.confusion_matrix(targets, called).tolist()
    for name in RATES:
        low, high = found["ci95"][name]
        assert low < expected[name] < high, name
    half = at_threshold(probabilities, scored, point={"threshold": 0.5}, seed=0)
    assert half["metrics"]["recall"] < found["metrics"]["recall"]


def test_the_threshold_itself_is_called():
    rows = np.array([[0.7, 0.3], [0.71, 0.29], [0.5, 0.5]])
    assert decisions(rows, POINT)[:, 1].tolist() == [1, 0, 1]
    assert decisions(rows, None)[:, 1].tolist() == [0, 0, 0]  # a tie goes to the lower label


def test_the_threshold_curve_is_the_rates_at_each_threshold(case):
    probabilities, scored = case
    curve = threshold_curve(probabilities, scored.targets)
    for place in (0, 30, 57, 100):
        called = probabilities[:, 1] >= curve["threshold"][place]
        recall = sklearn_metrics.recall_score(scored.targets, called)
        specificity = sklearn_metrics.recall_score(scored.targets, called, pos_label=0)
        assert curve["sensitivity"][place] == pytest.approx(recall, abs=1e-5)
        assert curve["specificity"][place] == pytest.approx(specificity, abs=1e-5)
    nobody = threshold_curve(np.zeros((0, 2)), np.zeros(0, np.int64))
    assert set(nobody["sensitivity"] + nobody["specificity"]) == {None}


def test_everything_is_there_and_is_json(case):
    probabilities, scored = case
    numbers = {"operating_point": POINT, "recalibration": POINTS}
    found = assessment(probabilities, scored, numbers=numbers, seed=0)
    assert set(found) == {
        "precision_recall", "subgroups", "thresholds", "roc_band", "at_operating_point", "recalibrated"
    }  # fmt: skip
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    better = np.interp(probabilities[:, 1], POINTS["said"], POINTS["so"])
    brier = sklearn_metrics.brier_score_loss(scored.targets, better)
    assert found["recalibrated"]["brier"] == pytest.approx(brier)
    assert sum(found["recalibrated"]["calibration"]["count"]) == 240
    assert len(found["subgroups"]) == 2
    without = assessment(probabilities, scored, numbers={}, seed=0)
    assert not {"at_operating_point", "recalibrated"} & set(without)


def test_a_model_that_diverged_and_several_classes_are_survived(case):
    probabilities, scored = case
    numbers = {"operating_point": POINT, "recalibration": POINTS}
    lost = np.full_like(probabilities, np.nan)
    json.dumps(assessment(lost, scored, numbers=numbers, seed=0), allow_nan=False)
    three = np.full((240, 3), 1 / 3)
    found = assessment(three, scored, numbers={"operating_point": None}, seed=0)
    assert set(found) == {"precision_recall", "subgroups"}
    assert found["precision_recall"] == {"recall": [], "precision": []}


def test_the_worst_hospital_is_the_one_with_the_lowest_score(case):
    probabilities, scored = case
    numbers = {"operating_point": POINT}
    entries = {}
    for position, name in enumerate(("north", "south")):
        mine = scored.hospitals == position
        entries[name] = of_hospital(probabilities, scored, mine, numbers=numbers, seed=0)
        called = probabilities[mine, 1] >= 0.3
        entries[name]["auc"] = sklearn_metrics.roc_auc_score(scored.targets[mine], probabilities[mine, 1])
        balanced = sklearn_metrics.balanced_accuracy_score(scored.targets[mine], called)
        assert entries[name]["at_operating_point"]["balanced_accuracy"] == pytest.approx(balanced)
        low, high = entries[name]["ci95"]["balanced_accuracy"]
        assert low < balanced < high
    worst = worst_hospital(entries)
    assert worst["auc"]["value"] == min(entry["auc"] for entry in entries.values())
    assert entries[worst["auc"]["hospital"]]["auc"] == worst["auc"]["value"]
    assert worst_hospital({"north": entries["north"]}) == {}


def test_the_strata_come_back_from_the_file(case, tmp_path):
    _, scored = case
    write_held_back(tmp_path / "held-back.npz", HeldBack(sets={"test": scored}, is_named=True))
    read = read_held_back(tmp_path / "held-back.npz").sets["test"]
    np.testing.assert_array_equal(read.strata["sex"], scored.strata["sex"])
    assert set(read.strata) == {"sex"}
