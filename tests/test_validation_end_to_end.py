"""A whole private run: the validation metrics in its result are those of the hospitals' own patients."""

import json

import numpy as np
import pytest

from common.evaluation import bin_edges
from common.hospital_config import HospitalConfig
from common.metrics import classification_metrics, confusion_matrix
from common.operating_point import choose
from common.settings import load, to_toml
from simulations.generated_data import write_generated_data
from simulations.preparation import prepare
from simulations.run import train_in
from simulations.scenario import make_scenario
from tests.validation_truth import patients_said


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Two hospitals that allow so much for an evaluation that its noise is half a patient in each cell."""
    folder = tmp_path_factory.mktemp("validated")
    data = write_generated_data(
        folder / "data", layout="npz", hospitals=2, patients_per_hospital=300, image_size=28, seed=0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        flags = {"data": str(data), "hospitals": 2, "rounds": 2, "epsilon": 60.0, "out": str(folder / "run")}
        scenario = make_scenario(flags | {"set": ("evaluation.score-bins=20",)})
        prepared = prepare(scenario)
        for hospital in prepared.hospitals:
            toml = prepared.folder / "hospitals" / hospital.name / "hospital.toml"
            config = load(HospitalConfig, toml)
            release = config.release.model_copy(update={"epsilon": 50.0})
            toml.write_text(to_toml(config.model_copy(update={"release": release})))
        return train_in(prepared.folder, prepared.config, scenario, quiet=True, say=lambda line: None)


def test_the_validation_metrics_are_near_those_of_the_very_patients(outcome):
    names = [hospital["name"] for hospital in outcome.result["hospitals"]]
    said, targets = (np.concatenate(parts) for parts in zip(
        *(patients_said(outcome.folder, name) for name in names), strict=True
    ))  # fmt: skip
    assert len(targets) > 50
    exact, found = classification_metrics(said, targets), outcome.result["validation"]
    assert found["hospitals"] == names
    for name in ("accuracy", "recall", "specificity", "auc"):
        within_bins = 0.05 if name == "auc" else 0.0
        assert found["noise"][name] < 0.15
        assert abs(found[name] - exact[name]) <= 5 * found["noise"][name] + within_bins, name
    # In whole patients: noise of deviation 0.42 moves a hospital's cell by 3 once in 1e8.
    (line,) = map(json.loads, (outcome.folder / "evaluations.jsonl").read_text().splitlines())
    confusion = confusion_matrix(said, targets).ravel()
    assert np.abs(np.array(line["counts"]["confusion"]) - confusion).max() <= 4
    assert confusion.sum() == len(targets)


def test_the_result_keeps_training_and_validation_apart(outcome):
    result = outcome.result
    assert result["test"]["auc"] is not None
    assert "ci95" in result["held_back_validation"]  # scored from outside, exactly
    for hospital in result["hospitals"]:
        assert (hospital["steps"], hospital["releases"]) == (2, 2)
        assert 0 < hospital["validation_epsilon"] <= 50.0
        assert hospital["validation_epsilon"] == pytest.approx(result["validation"]["epsilon"], rel=1e-3)
    described = json.loads((outcome.folder / "model.json").read_text())
    assert {"operating_point", "calibration", "recalibration"} <= set(described)


def test_the_test_split_is_scored_at_the_threshold_that_travels_with_the_model(outcome):
    """The point is what the released counts give, and the test patients have no part in it."""
    described = json.loads((outcome.folder / "model.json").read_text())
    point, there = described["operating_point"], outcome.result["test"]["at_operating_point"]
    (line,) = map(json.loads, (outcome.folder / "evaluations.jsonl").read_text().splitlines())
    histograms = np.reshape(line["counts"]["scores"], (2, 20))
    deviation = line["noise_variance"]["scores"] ** 0.5
    assert point == choose(histograms, bin_edges(20), deviation=deviation)
    assert there["threshold"] == point["threshold"]
    assert there == outcome.evaluation["test"]["at_operating_point"]
    low, high = there["ci95"]["balanced_accuracy"]
    assert low <= there["metrics"]["balanced_accuracy"] <= high
    assert outcome.result["test"]["average_precision"] is not None
    report = (outcome.folder / "report.html").read_text()
    assert f"called from {there['threshold']:.3f}".replace("0.", ".") in report
