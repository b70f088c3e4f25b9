"""A hospital whose budget covers three of six rounds, in a whole run: it leaves, and nobody else stops."""

import json
import re

import pytest

from client.ledger.ledger import Ledger
from client.received_models import received_models
from common.hospital_config import HospitalConfig
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from common.settings import load, to_toml
from simulations.preparation import prepare
from simulations.run import train_in
from simulations.scenario import make_scenario

NOISE, ROUNDS, AFFORDED = 4.0, 6, 3


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Three hospitals; the first one's budget is exactly what three rounds cost."""
    folder = tmp_path_factory.mktemp("three") / "run"
    flags = {"hospitals": 3, "rounds": ROUNDS, "image_size": 8, "model": "softmax", "out": str(folder)}
    scenario = make_scenario(flags)
    prepared = prepare(scenario)
    names = json.loads((folder / "hospitals" / "roster.json").read_text())["hospitals"]
    knobs = prepared.config.privacy
    steps = AFFORDED * knobs.local_steps
    three = PrivacyEvent(sampling_rate=knobs.sampling_rate, noise_multiplier=NOISE, steps=steps)
    for name in names:
        toml = folder / "hospitals" / name / "hospital.toml"
        config = load(HospitalConfig, toml)
        budget = epsilon([three], delta=config.delta) if name == names[0] else 100.0
        changes = {"mode": "fixed", "noise_multiplier": NOISE, "epsilon": budget}
        policy = config.policy.model_copy(update=changes)
        toml.write_text(to_toml(config.model_copy(update={"policy": policy})))
    budget = load(HospitalConfig, folder / "hospitals" / names[0] / "hospital.toml").policy.epsilon
    return names[0], budget, train_in(folder, prepared.config, scenario, quiet=True, say=lambda _: None)


def rounds_of(outcome, name):
    lines = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line.get("hospital") == name and "outcome" in line]
    return {line["round"]: (line["outcome"], line.get("code")) for line in mine}


def test_it_trains_three_times_and_leaves_and_the_others_finish(outcome):
    name, budget, run = outcome
    assert run.status == "completed"
    assert run.result["rounds"] == ROUNDS
    told = {hospital["name"]: hospital for hospital in run.result["hospitals"]}
    assert told[name]["rounds"] == AFFORDED
    assert {entry["rounds"] for other, entry in told.items() if other != name} == {ROUNDS}
    assert told[name]["epsilon"] <= budget
    outcomes = rounds_of(run, name)
    assert [outcomes[number][0] for number in (1, 2, 3)] == ["aggregated"] * 3
    assert outcomes[4] == ("refused", "budget-spent")
    assert not {5, 6} & {number for number, (kind, _) in outcomes.items() if kind == "aggregated"}


def test_its_ledger_holds_three_charges_of_exactly_its_budget(outcome):
    name, budget, run = outcome
    ledger = Ledger.open(run.folder / "hospitals" / name / "ledger")
    training = [charge for charge in ledger.charges() if charge.purpose == "training"]
    assert [charge.key.round_number for charge in training] == [1, 2, 3]
    assert epsilon([charge.event for charge in training], delta=training[0].delta) == budget
    assert ledger.verify() == []


def test_it_still_receives_the_model(outcome):
    name, _, run = outcome
    (model,) = received_models(run.folder / "hospitals" / name / "state" / "models")
    assert model["state"] == "whole"
    assert model["sha256"] == run.result["model"]["sha256"]


def test_the_report_says_so(outcome):
    name, _, run = outcome
    page = (run.folder / "report.html").read_text()
    assert "the hospital declined: budget-spent" in page
    assert re.search(rf"{re.escape(name)}.{{0,400}}\b{AFFORDED}\b", page, flags=re.DOTALL)
