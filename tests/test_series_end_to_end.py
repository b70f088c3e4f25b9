"""A whole private run on visits: noised validation counts, the model, and answers about new patients."""

import csv
import json
import sys

import pytest

from client import cli
from simulations.generated_data import write_generated_data
from simulations.run import run_scenario
from simulations.scenario import make_scenario

pytestmark = [pytest.mark.faults, pytest.mark.ci]
BUDGET = 20.0
LEAVES = {
    "envelope": [
        *("attempt", "encoding", "masked", "model-hash"),
        *("round", "run-id", "schema-version", "task"),
    ],
    "arrays": ["parameters"],
    "metrics": [
        *("delta", "epsilon", "noise-multiplier", "num-examples", "steps"),
        *("training-ended", "training-started"),
    ],
    "ledger-receipt": ["bytes"],
}
"""Names of what an update of single images holds; `steps` are those of the optimiser."""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    data = write_generated_data(
        folder / "data",
        layout="csv",
        hospitals=2,
        patients_per_hospital=40,
        image_size=20,
        seed=0,
        visits=True,
    )
    flags = {
        "data": str(data),
        "partition": "column:site",
        "series": "visits",
        "task": "progression",
        "model": "gru",
        "rounds": 2,
        "epsilon": BUDGET,
        "image_size": 20,
        "out": str(folder / "run"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return run_scenario(make_scenario(flags)), data


def test_it_ends_within_its_budget_with_a_model_that_says_what_it_takes(outcome):
    run, _ = outcome
    assert run.status == "completed"
    assert run.result["data"]["task"] == "progression"
    for hospital in run.result["hospitals"]:
        assert 0.5 * BUDGET < hospital["epsilon"] <= BUDGET
    description = json.loads((run.folder / "model.json").read_text())
    assert description["series"] == {"kind": "visits", "steps": 5, "next_finding": True}
    assert description["spec"]["steps"] == 5
    assert "series of up to 5 visits" in (run.folder / "MODEL_CARD.md").read_text()
    assert run.result["validation"]  # the hospitals' own noised counts of series


def test_what_leaves_is_what_leaves_of_single_images(outcome):
    run, _ = outcome
    audits = list(run.folder.glob("hospitals/*/state/audit.jsonl"))
    assert len(audits) == 2
    for audit in audits:
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        (first, *_) = [line for line in lines if line["what"] == "update"]
        assert {name: record["names"] for name, record in first["records"].items()} == LEAVES


def test_the_run_answers_about_a_table_of_patients(outcome, tmp_path, monkeypatch, capsys):
    run, data = outcome
    table = data.parent / "asked.csv"
    with data.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    table.write_text(
        "\n".join(["filename,patient,days", *(f"{r['filename']},{r['patient']},{r['days']}" for r in rows)])
    )
    words = ["flower-client", "predict", str(run.folder), str(table), "--format", "json"]
    monkeypatch.setattr(sys, "argv", [*words, "--without-check", "inverted"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert len(said["images"]) == len({row["patient"] for row in rows})
