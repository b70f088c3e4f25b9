"""Whole private runs of a multi-label and an ordinal task: data, training, noised counts, report, answer."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from client.prediction.answers import answers
from client.prediction.doubts import Rule
from client.prediction.inputs import find_inputs
from client.prediction.stored_model import read_model
from common.hospital_config import HospitalConfig
from common.settings import load, to_toml
from server.reporting.report import write_report
from simulations.preparation import prepare
from simulations.run import train_in
from simulations.scenario import make_scenario

SIDE, PATIENTS = 16, 240


def write_films(folder):
    """Films with a bright left half, a bright right half, both or none; the more bright, the worse."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(PATIENTS):
        left, right = random.integers(0, 2, 2).tolist()
        film = random.integers(60, 120, (SIDE, SIDE))
        film[:, : SIDE // 2] += 110 * left
        film[:, SIDE // 2 :] += 110 * right
        Image.fromarray(film.astype(np.uint8)).save(folder / "images" / f"{number}.png")
        findings = "|".join(name for name, there in (("left", left), ("right", right)) if there)
        split = ("train", "train", "train", "val", "test")[number % 5]
        rows.append((f"images/{number}.png", findings or "No Finding", left + right, f"p{number}", split))
    path = folder / "films.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "findings", "severity", "patient", "split"), *rows])
    return path


def worst_of(films):
    """A film with both findings, and so of the highest level."""
    with films.open() as file:
        return films.parent / next(row["path"] for row in csv.DictReader(file) if row["severity"] == "2")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return write_films(tmp_path_factory.mktemp("films"))


def run(films, folder, **flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        given = {"data": str(films), "hospitals": 2, "rounds": 5, "epsilon": 200.0, "model": "softmax"}
        chosen = ("training.learning-rate=1.0",)
        scenario = make_scenario(given | {"out": str(folder / "run"), "set": chosen} | flags)
        prepared = prepare(scenario)
        for hospital in prepared.hospitals:
            toml = prepared.folder / "hospitals" / hospital.name / "hospital.toml"
            config = load(HospitalConfig, toml)
            release = config.release.model_copy(update={"epsilon": 150.0})
            toml.write_text(to_toml(config.model_copy(update={"release": release})))
        outcome = train_in(prepared.folder, prepared.config, scenario, quiet=True, say=lambda line: None)
        assert outcome.status == "completed", outcome.result
        return outcome


def test_several_findings_from_data_to_answer(films, tmp_path):
    outcome = run(films, tmp_path, task="multi-label", label_column="findings")
    result, folder = outcome.result, outcome.folder
    assert (result["private"], result["data"]["task"]) == (True, "multi-label")
    assert result["data"]["classes"] == ["left", "right"]
    assert set(result["test"]) >= {"auc", "average_precision", "f1", "exact_match", "hamming_loss"}
    assert result["test"]["auc"] > 0.8
    # What hospitals released: tables of two findings, noise for a patient who is in one cell of each.
    (line,) = map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines())
    assert line["task"] == "multi-label"
    assert len(line["counts"]["confusion"]) == 2 * 2 * 2
    assert set(result["validation"]) >= {"auc", "f1", "hamming_loss", "noise"}
    assert result["validation"]["auc"] is not None
    # The page names each finding and calls none of them the finding.
    write_report(folder)
    page, card = (folder / "report.html").read_text(), (folder / "MODEL_CARD.md").read_text()
    assert "Each finding by itself" in page
    assert "do not add up to 1" in card
    # The answer about a film with both.
    stored = read_model(folder)
    assert len(stored.thresholds) == 2
    with_both = worst_of(films)
    (answer,) = answers(
        stored, find_inputs([with_both], max_pixels=10**6), max_pixels=10**6, without=frozenset(Rule)
    )
    assert sum(answer.probabilities.values()) != pytest.approx(1)
    assert answer.decision == "left, right"


def test_ordered_levels_from_data_to_answer(films, tmp_path):
    outcome = run(films, tmp_path, task="ordinal", label_column="severity")
    result, folder = outcome.result, outcome.folder
    assert result["data"]["classes"] == ["0", "1", "2"]
    assert set(result["test"]) >= {"auc", "quadratic_kappa", "mae", "accuracy", "balanced_accuracy"}
    assert result["test"]["auc"] > 0.8
    (line,) = map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines())
    assert (len(line["counts"]["confusion"]), len(line["counts"]["scores"])) == (9, 2 * 2 * 10)
    assert set(result["validation"]) >= {"auc", "quadratic_kappa", "mae"}
    write_report(folder)
    assert "Each step between levels by itself" in (folder / "report.html").read_text()
    stored = read_model(folder)
    worst = worst_of(films)
    (answer,) = answers(
        stored, find_inputs([worst], max_pixels=10**6), max_pixels=10**6, without=frozenset(Rule)
    )
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert answer.decision in ("1", "2")


def test_a_hospital_that_allows_other_tasks_only_refuses(films, tmp_path):
    from client.policy import TrainingRequest, require_allowed
    from common.errors import PolicyError

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        flags = {"data": str(films), "hospitals": 2, "task": "multi-label", "label_column": "findings"}
        prepared = prepare(make_scenario(flags | {"out": str(tmp_path / "run")}))
    toml = prepared.folder / "hospitals" / prepared.hospitals[0].name / "hospital.toml"
    config = load(HospitalConfig, toml)
    asked = TrainingRequest.of(prepared.config.public_plan, round_number=1, unit="patient")
    require_allowed(config, asked)
    policy = config.policy.model_copy(update={"tasks": ("classification", "ordinal")})
    with pytest.raises(PolicyError, match=r"trains multi-label, which is not among policy\.tasks"):
        require_allowed(config.model_copy(update={"policy": policy}), asked)
