import json
from pathlib import Path

import numpy as np
import pytest

from common import metrics
from common.config import FederationConfig
from common.errors import FederationError
from common.models.registry import build_model, initial_parameters, load_parameters
from common.parameters import parameters_sha256, read_safetensors, write_safetensors
from common.preprocessing import Preprocessing
from simulations.preparation import Prepared, prepare
from simulations.scenario import make_scenario
from simulations.scoring import Scoring, complete_result, newest_checkpoint, times_of_rounds


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("scoring") / "run"
    return prepare(make_scenario({"hospitals": 2, "image_size": 28, "out": str(folder)}))


def add_checkpoint(prepared: Prepared, number: int, seed: int) -> dict[str, np.ndarray]:
    parameters = initial_parameters(prepared.config.model_spec, seed)
    folder = prepared.folder / "checkpoints" / str(number)
    write_safetensors(folder / "model.safetensors", parameters)
    average = {f"average/{name}": array for name, array in parameters.items()}
    write_safetensors(folder / "optimizer.safetensors", average)
    (folder / "manifest.json").write_text("{}")
    return parameters


def expected_auc(
    config: FederationConfig, parameters: dict[str, np.ndarray], prepared: Prepared
) -> float | None:
    import torch

    model = build_model(config.model_spec).eval()
    load_parameters(model, parameters)
    test = prepared.held_back.sets["test"]
    preprocessing = Preprocessing(image_size=config.data.image_size, channels=config.data.channels)
    with torch.no_grad():
        outputs = model(torch.from_numpy(preprocessing.standardise(test.images)))
    return metrics.auc(torch.softmax(outputs.double(), dim=1).numpy(), test.targets)


def test_scores_are_those_of_the_models_on_the_held_back_patients(prepared: Prepared) -> None:
    config, folder = prepared.config, prepared.folder
    names = [hospital.name for hospital in prepared.hospitals]
    first, last = add_checkpoint(prepared, 1, seed=1), add_checkpoint(prepared, 2, seed=2)
    write_safetensors(folder / "model.safetensors", last)
    (folder / "result.json").write_text(
        json.dumps(
            {"status": "completed", "time": {"wall_s": 3.0}, "hospitals": [{"name": n} for n in names]}
        )
    )
    with Scoring(config, hospitals=names, held_back=folder / "held-back.npz") as scoring:
        scoring.make_initial_weights(folder / "initial.safetensors")
        evaluation = scoring.finish()
    initial = read_safetensors(folder / "initial.safetensors")
    assert parameters_sha256(initial) == parameters_sha256(
        initial_parameters(config.model_spec, config.federation.seed)
    )
    assert json.loads((folder / "evaluation.json").read_text()) == evaluation
    # Only the newest checkpoint is scored: the older one was behind already.
    assert [point["round"] for point in evaluation["per_round"]] == [2]
    auc = expected_auc(config, last, prepared)
    assert evaluation["per_round"][0]["auc"] == pytest.approx(auc, abs=1e-6)
    test = evaluation["test"]
    assert test["metrics"]["auc"] == pytest.approx(auc, abs=1e-6)
    assert test["metrics"]["auc"] != pytest.approx(expected_auc(config, first, prepared), abs=1e-3)
    low, high = test["ci95"]["auc"]
    assert low < test["metrics"]["auc"] < high
    assert test["roc"]["fpr"][0] == 0.0
    assert test["roc"]["tpr"][-1] == 1.0
    assert sum(map(sum, test["confusion"])) == test["images"] == len(prepared.held_back.sets["test"].targets)
    assert evaluation["validation"] is None
    # Phantoms come with sites: each hospital is scored on its own kind of patients.
    assert sum(entry["images"] for entry in evaluation["hospitals"].values()) == test["images"]
    result = complete_result(folder, evaluation, engine="embedded")
    assert result == json.loads((folder / "result.json").read_text())
    assert result["engine"] == "embedded"
    assert result["test"]["ci95"]["auc"] == [low, high]
    assert [hospital["test"]["auc"] for hospital in result["hospitals"]] == [
        evaluation["hospitals"][name]["auc"] for name in names
    ]


def test_a_model_that_is_not_there_is_said_and_a_dead_process_too(prepared: Prepared) -> None:
    with Scoring(prepared.config, hospitals=[], held_back=prepared.folder / "held-back.npz") as scoring:
        with pytest.raises(FederationError, match="cannot be scored"):
            scoring._ask({"do": "final", "path": str(prepared.folder / "nothing"), "hospitals": []})
        scoring._process.kill()
        scoring._process.join()
        with pytest.raises(FederationError, match="has died"):
            scoring.make_initial_weights(prepared.folder / "other.safetensors")


def test_the_newest_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("2", "10", ".11.7.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    (tmp_path / "checkpoints" / "12").mkdir()
    assert newest_checkpoint(tmp_path) == 10


def test_overhead_is_the_time_in_which_no_hospital_trains() -> None:
    def line(start: float, end: float) -> dict[str, object]:
        return {"round": 1, "hospital": "h", "sent": 10.0, "training_started": start, "training_ended": end}

    # 10 sent; 10.5-12 and 11-13 overlap, 14-15 alone; closed at 15.25: 3.5 s trained, 1.75 s rest.
    lines = [line(10.5, 12.0), line(11.0, 13.0), line(14.0, 15.0), {"round": 1, "closed": 15.25}]
    assert times_of_rounds(lines) == {"train_s": 3.5, "overhead_s_per_round": 1.75}
    refused = line(0.0, 0.0) | {"training_started": None, "training_ended": None}
    assert times_of_rounds([refused, {"round": 1, "closed": 10.25}])["overhead_s_per_round"] == 0.25
    assert times_of_rounds([]) == {"train_s": 0.0, "overhead_s_per_round": 0.0}
