"""Whole runs from outside: what a person asks for, what they are told, and what must never be written."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import FederationConfig
from common.files import manifest_problem
from common.pages.html import bound
from common.parameters import parameters_sha256, read_safetensors
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from common.settings import load
from simulations.run import Outcome, run_scenario
from simulations.scenario import make_scenario
from tests.planted_films import NAME, SIZE, files_naming_it, names_it, write_folders, write_table

ROOT, BIN = Path(__file__).resolve().parents[1], Path(sys.executable).parent
ASKED, ROUNDS = 3.0, 3


@dataclass(frozen=True)
class Run:
    """A finished command."""

    folder: Path
    exit_code: int
    out: str
    err: str
    cache: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()


def simulate(base: Path, *arguments: str) -> Run:
    """`flower-simulate run` in a folder of its own, ended after three minutes."""
    command = [str(BIN / "flower-simulate"), "run", *arguments, "--out", str(base / "run")]
    environment = {"XDG_CACHE_HOME": str(base / "cache"), "PATH": str(BIN), "OMP_NUM_THREADS": "1"}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "HOME": str(base), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, cwd=base, capture_output=True, text=True, timeout=180, check=False
    )
    return Run(base / "run", done.returncode, done.stdout, done.stderr, base / "cache")


def flower_client(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(BIN / "flower-client"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def private_run(tmp_path_factory) -> Run:
    """Two sites in a table with names in it, under privacy."""
    base = tmp_path_factory.mktemp("private")
    table = write_table(base / "films", patients={"east": 101, "west": 64})
    flags = ["--data", str(table), "--partition", "column:site", "--image-size", str(SIZE)]
    run = simulate(base, *flags, "--rounds", str(ROUNDS), "--epsilon", str(ASKED), "--seed", "4")
    assert run.exit_code == 0, run.err
    return run


@pytest.fixture(scope="module")
def open_run(tmp_path_factory) -> Run:
    """Films in class folders with names, without privacy as asked for."""
    base = tmp_path_factory.mktemp("open")
    films = write_folders(base / "films", images=90)
    flags = ["--data", str(films), "--hospitals", "2", "--image-size", str(SIZE)]
    run = simulate(base, *flags, "--rounds", "2", "--private", "false")
    assert run.exit_code == 0, run.err
    return run


@pytest.fixture(scope="module")
def reproducible_run(tmp_path_factory) -> tuple[Outcome, list[str]]:
    folder = tmp_path_factory.mktemp("reproducible") / "run"
    said: list[str] = []
    flags = {"hospitals": 2, "rounds": 2, "image_size": SIZE, "reproducible": True, "out": str(folder)}
    return run_scenario(make_scenario(flags), say=said.append), said


# --- what a run leaves ---


def test_a_run_leaves_everything_the_design_names(private_run):
    files = {path.relative_to(private_run.folder).as_posix() for path in private_run.folder.rglob("*")}
    assert {
        "config.toml",
        "result.json",
        "metrics.jsonl",
        "model.safetensors",
        "model.json",
        "MODEL_CARD.md",
        "report.html",
        "hospitals/east/ledger/ledger.sqlite",
        "hospitals/west/state/audit.jsonl",
        *(f"checkpoints/{ROUNDS}/{name}" for name in ("model.safetensors", "state.json", "manifest.json")),
    } <= files
    assert any(name.startswith("plots/") for name in files)
    assert not any(path.name.startswith(("spool", "stop")) for path in private_run.folder.iterdir())
    result = private_run.result
    assert (result["schema"], result["status"], result["engine"]) == (1, "completed", "embedded")
    assert (result["private"], result["rounds"], result["seed"]) == (True, ROUNDS, 4)
    assert result["data"] == {
        "name": "films",
        "task": "classification",
        "classes": ["normal", "opacity"],
        "unit": "patient",
    }
    assert 0 <= result["test"]["auc"] <= 1
    assert result["test"]["ci95"]["auc"][0] <= result["test"]["auc"] <= result["test"]["ci95"]["auc"][1]


def test_each_round_is_told_once_and_its_times_follow_each_other(private_run):
    closed = [line for line in private_run.lines() if "closed" in line]
    assert [line["round"] for line in closed] == list(range(1, ROUNDS + 1))
    own = [line for line in private_run.lines() if "hospital" in line]
    assert [(line["round"], line["hospital"]) for line in own] == [
        (number, name) for number in range(1, ROUNDS + 1) for name in ("east", "west")
    ]
    for line in own:
        assert line["outcome"] == "aggregated"
        assert line["sent"] <= line["training_started"] <= line["training_ended"] <= line["received"]
        assert line["bytes_up"] > private_run.result["model"]["parameters"]  # a byte a number
    assert closed[-1]["aggregated"] == 2


def test_the_model_is_the_one_the_result_names_everywhere(private_run):
    sha256 = private_run.result["model"]["sha256"]
    assert parameters_sha256(read_safetensors(private_run.folder / "model.safetensors")) == sha256
    assert json.loads(private_run.text("model.json"))["sha256"] == sha256
    for name in ("east", "west"):
        (kept,) = (private_run.folder / "hospitals" / name / "state" / "models").iterdir()
        assert manifest_problem(kept, required=["model.safetensors", "MODEL_CARD.md"]) is None
        assert parameters_sha256(read_safetensors(kept / "model.safetensors")) == sha256


# --- privacy: the numbers ---


def patients_of(run: Run, name: str) -> int:
    with np.load(run.folder / "hospitals" / name / "data" / "images.npz", allow_pickle=False) as part:
        return len(np.unique(part["train_patients"]))


def test_no_epsilon_is_above_the_asked_one_and_delta_is_small_enough(private_run):
    hospitals = private_run.result["hospitals"]
    assert [hospital["name"] for hospital in hospitals] == ["east", "west"]
    for hospital in hospitals:
        assert 0.9 * ASKED < hospital["epsilon"] <= ASKED
        true_number = patients_of(private_run, hospital["name"])
        assert true_number > 50
        assert hospital["delta"] <= 1 / (10 * true_number)
        assert hospital["enrolled_patients"] >= true_number
        assert hospital["delta"] == 1 / (10 * hospital["enrolled_patients"])


def test_the_printed_epsilon_is_that_of_the_printed_steps(private_run):
    for hospital in private_run.result["hospitals"]:
        assert hospital["rounds"] == ROUNDS
        event = PrivacyEvent(
            sampling_rate=hospital["sample_rate"],
            noise_multiplier=hospital["noise_multiplier"],
            steps=hospital["steps"],
        )
        recomputed = epsilon([event], delta=hospital["delta"])
        assert recomputed <= hospital["epsilon"] <= 1.005 * recomputed
        printed = re.search(rf"  {hospital['name']} .* epsilon ([0-9.]+) at delta", private_run.out)
        assert hospital["epsilon"] <= float(printed[1]) <= min(ASKED, hospital["epsilon"] + 0.001)


def test_an_independent_command_agrees_with_the_ledger(private_run):
    where = str(private_run.folder / "hospitals" / "east")
    verified = flower_client("ledger", "verify", where, "--format", "json")
    assert verified.returncode == 0, verified.stdout
    assert json.loads(verified.stdout) == {"ok": True, "charges": ROUNDS, "findings": []}
    shown = json.loads(flower_client("ledger", "show", where, "--format", "json").stdout)
    hospital = private_run.result["hospitals"][0]
    assert shown["epsilon"] == pytest.approx(hospital["epsilon"], rel=0.005)
    assert shown["epsilon"] <= ASKED
    assert shown["patients"] == patients_of(private_run, "east")


def test_two_epsilons_are_stated_and_the_second_follows_from_the_noise_of_both(private_run):
    """Both divide by their weights: against an outsider each has the noise of both, east's and west's."""
    hospitals = private_run.result["hospitals"]
    together = math.hypot(*(hospital["noise_multiplier"] for hospital in hospitals))
    stated = json.loads(private_run.text("model.json"))["privacy"]
    for hospital in hospitals:
        event = PrivacyEvent(
            sampling_rate=hospital["sample_rate"], noise_multiplier=together, steps=hospital["rounds"]
        )
        exact = epsilon([event], delta=hospital["delta"])
        assert exact <= hospital["epsilon_outsider"] <= exact * 1.006
        assert hospital["epsilon_outsider"] < 0.9 * hospital["epsilon"]
        assert hospital["epsilon_outsider_proven"] is True
        assert stated["hospitals"][hospital["name"]]["epsilon_outsider"] == hospital["epsilon_outsider"]
        assert f"({bound(hospital['epsilon_outsider'], 3)} against an outsider)" in private_run.out
        for name in ("MODEL_CARD.md", "report.html"):
            assert bound(hospital["epsilon_outsider"], 3) in private_run.text(name)


def test_both_sides_keep_a_release_certificate_that_one_command_verifies(private_run):
    for hospital in private_run.result["hospitals"]:
        name = hospital["name"]
        at_server = private_run.folder / "certificates" / f"{name}.json"
        (kept,) = (private_run.folder / "hospitals" / name / "state" / "models").iterdir()
        assert at_server.read_bytes() == (kept / "certificate.json").read_bytes()
        key = private_run.folder / "hospitals" / name / "keys" / "hospital.key.pub"
        model = private_run.folder / "model.safetensors"
        done = flower_client(
            *("certificate", "verify", str(at_server), "--key", str(key)),
            *("--model", str(model), "--format", "json"),
        )
        assert done.returncode == 0, done.stdout
        content = json.loads(done.stdout)["certificate"]["content"]
        assert content["hospital"] == name
        assert content["training"]["epsilon"] == pytest.approx(hospital["epsilon"], rel=1e-9)
        assert content["outsider"]["epsilon"] == hospital["epsilon_outsider"]
        assert content["rounds_answered"] == ROUNDS


# --- privacy: the names ---


def test_the_search_finds_a_planted_name(private_run, tmp_path):
    np.savez_compressed(tmp_path / "a.npz", ids=np.array([NAME]))
    (tmp_path / "b.txt").write_bytes(f"x{NAME}".encode("utf-16"))
    (tmp_path / f"{NAME}.empty").touch()
    assert len(list(files_naming_it(tmp_path))) == 3
    assert list(files_naming_it(private_run.folder.parent / "films"))


@pytest.mark.parametrize("kind", ["private_run", "open_run"])
def test_no_name_of_a_patient_or_an_image_is_written_anywhere(kind, request):
    run = request.getfixturevalue(kind)
    assert sum(path.is_file() for path in run.folder.rglob("*")) > 40
    assert list(files_naming_it(run.folder)) == []
    assert list(files_naming_it(run.cache)) == []
    assert any(run.cache.rglob("*.npy"))
    assert not names_it(run.out.encode())
    assert not names_it(run.err.encode())


def test_what_could_not_be_read_is_counted(private_run, open_run):
    assert "2 images are left out: 1 missing, 1 unreadable" in private_run.out
    assert "1 images are left out: 1 unreadable" in open_run.out


# --- no privacy is said everywhere ---


def test_without_privacy_it_is_said_everywhere(open_run):
    result = open_run.result
    assert result["private"] is False
    assert all(hospital["epsilon"] is None for hospital in result["hospitals"])
    assert all(hospital["noise_multiplier"] is None for hospital in result["hospitals"])
    assert "NOT PRIVATE" in open_run.out
    assert "epsilon at most" not in open_run.out
    for name in ("report.html", "MODEL_CARD.md"):
        assert "not private" in open_run.text(name).lower(), name
    assert all(line["epsilon"] is None for line in open_run.lines() if "hospital" in line)
    for name in ("hospital-1", "hospital-2"):
        shown = flower_client("ledger", "show", str(open_run.folder / "hospitals" / name)).stdout
        assert "NO PRIVACY CLAIMED" in shown


def test_a_private_run_is_not_called_otherwise(private_run):
    for name in ("report.html", "MODEL_CARD.md"):
        assert "not private" not in private_run.text(name).lower(), name
    assert "NOT PRIVATE" not in private_run.out


def test_a_reproducible_run_claims_nothing_and_says_so(reproducible_run):
    outcome, said = reproducible_run
    assert outcome.status == "completed"
    assert outcome.result["private"] is False
    assert all(hospital["epsilon"] is None for hospital in outcome.result["hospitals"])
    assert "claims NO privacy" in "\n".join(said)
    for name in ("report.html", "MODEL_CARD.md"):
        text = (outcome.folder / name).read_text().lower()
        assert "reproducible" in text, name
        assert "not private" in text or "no privacy" in text, name


def test_privacy_is_not_lost_by_accident(tmp_path):
    refused = simulate(tmp_path, "--set", "federation.private=false", "--rounds", "1", "--hospitals", "2")
    assert refused.exit_code == 2
    assert "--private" in refused.err
    assert not refused.folder.exists()


# --- real images ---


def test_pneumonia_at_five_hospitals(shared_data, tmp_path):
    images = shared_data / "pneumoniamnist" / "pneumoniamnist.npz"
    run = simulate(tmp_path, "--data", str(images), "--hospitals", "5", "--rounds", "2", "--epsilon", "8")
    assert run.exit_code == 0, run.err
    result = run.result
    assert len(result["hospitals"]) == 5
    assert all(h["rounds"] == 2 and h["epsilon"] <= 8 for h in result["hospitals"])
    assert result["data"]["unit"] == "image"
    assert result["test"]["auc"] > 0.7
    assert "one image, not one patient" in run.out


@pytest.mark.faults
def test_covid_films_by_site_leave_out_who_cannot_take_part(shared_data, tmp_path):
    covid = shared_data / "covid_cxr_sites"
    flags = ["--data", str(covid / "metadata.csv"), "--label-column", "finding_group"]
    flags += ["--path-column", "filename", "--path-root", str(covid / "images")]
    flags += ["--patient-column", "patientid", "--partition", "column:site", "--rounds", "2"]
    run = simulate(tmp_path, *flags)
    assert run.exit_code == 0, run.err
    assert len(run.result["hospitals"]) >= 5
    (left_out,) = (line for line in run.out.splitlines() if "without " in line)
    assert "without unknown: 2 patients to train on" in left_out
    assert "unknown" not in {hospital["name"] for hospital in run.result["hospitals"]}
    assert all(line["outcome"] == "aggregated" for line in run.lines() if "hospital" in line)
    assert run.result["data"]["unit"] == "patient"


@pytest.mark.faults
def test_kermany_films_in_folders(shared_data, tmp_path):
    run = simulate(
        tmp_path, "--data", str(shared_data / "kermany_cxr"), "--image-size", "28", "--rounds", "2"
    )
    assert run.exit_code == 0, run.err
    assert run.result["data"]["classes"] == ["NORMAL", "PNEUMONIA"]
    assert len(run.result["hospitals"]) == 5


# --- the model is asked again ---


def test_prediction_says_of_the_test_split_what_evaluation_said(open_run, tmp_path):
    from PIL import Image

    from client.prediction.answers import answers
    from client.prediction.doubts import Rule
    from client.prediction.inputs import find_inputs
    from client.prediction.stored_model import read_model
    from common.metrics import classification_metrics
    from common.probability_scores import probability_scores
    from simulations.held_back import read_held_back
    from simulations.predictions import predict_test_split

    held_back, stored = open_run.folder / "held-back.npz", read_model(open_run.folder)
    test = read_held_back(held_back).sets["test"]
    for number, pixels in enumerate(test.images):
        Image.fromarray(pixels[0]).save(tmp_path / f"{number:04d}.png")
    inputs = find_inputs([tmp_path], max_pixels=10**6)
    found = answers(stored, inputs, max_pixels=10**6, without=frozenset(Rule))
    ours = np.array([list(answer.probabilities.values()) for answer in found])
    config = load(
        FederationConfig, open_run.folder / "config.toml", [f"runtime.run-folder={open_run.folder}"]
    )
    np.testing.assert_allclose(predict_test_split(held_back, {"run": config})["run"], ours, rtol=0, atol=1e-6)
    scores = json.loads((open_run.folder / "evaluation.json").read_text())["test"]["metrics"]
    assert classification_metrics(ours, test.targets) | probability_scores(
        ours, test.targets
    ) == pytest.approx(scores)
