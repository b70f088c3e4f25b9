"""A whole private run of the model `scattering`: one linear layer, charged as full batches."""

import json

import numpy as np
import pytest

from common.parameters import read_safetensors
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from simulations.generated_data import write_generated_data
from simulations.run import run_scenario
from simulations.scenario import make_scenario

ROUNDS, BUDGET = 6, 20.0


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scattering")
    data = write_generated_data(
        folder / "data", layout="npz", hospitals=2, patients_per_hospital=150, image_size=16, seed=0
    )
    flags = {
        "data": str(data),
        "hospitals": 2,
        "model": "scattering",
        "rounds": ROUNDS,
        "epsilon": BUDGET,
        "out": str(folder / "run"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return run_scenario(make_scenario(flags))


def test_it_learns_within_its_budget(outcome):
    assert outcome.status == "completed"
    assert outcome.result["test"]["auc"] > 0.6
    for hospital in outcome.result["hospitals"]:
        assert 0.9 * BUDGET < hospital["epsilon"] <= BUDGET


def test_what_is_trained_is_one_linear_layer_that_has_moved(outcome):
    parameters = read_safetensors(outcome.folder / "model.safetensors")
    assert {name: array.shape for name, array in parameters.items()} == {"output.weight": (2, 1001)}
    assert np.abs(parameters["output.weight"]).max() > 0


def test_full_batches_cost_what_the_gaussian_mechanism_costs(outcome):
    lines = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    (noise,) = {line["noise_multiplier"] for line in lines if line.get("hospital") == "hospital-1"}
    hospital = outcome.result["hospitals"][0]
    # Without subsampling T steps at sigma are one at sigma / sqrt(T).
    plain = epsilon(
        [PrivacyEvent(sampling_rate=1.0, noise_multiplier=noise / ROUNDS**0.5, steps=1)],
        delta=hospital["delta"],
    )
    assert hospital["epsilon"] == pytest.approx(plain, rel=5e-3)
