"""What a run leaves: `result.json` (schema 1, for scripts), the model and its description.

A simulation fills in `engine`, the data's name and the scores of its held-back test split.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common.config import FederationConfig
from common.files import write_bytes_atomically, write_json_atomically
from common.messages import SCHEMA_VERSION
from common.parameters import parameters_sha256, write_safetensors
from common.preprocessing import Preprocessing
from common.privacy.plan import NEIGHBOURING_RELATION
from server.collection import Status
from server.evaluation_result import model_numbers, validation_block, validation_costs
from server.outsider import OutsiderCost, outsider_costs
from server.reporting.model_card import model_card
from server.reporting.run_record import read_run
from server.run_folder import MODEL, MODEL_CARD, MODEL_DESCRIPTION, RESULT, RunFolder
from server.run_state import RunState

RESULT_SCHEMA = 1
ENGINE = "deployment"


def write_result(
    folder: RunFolder,
    config: FederationConfig,
    state: RunState,
    status: Status,
    *,
    wall_s: float,
    receipts: Mapping[str, bool] | None = None,
) -> None:
    """Write result.json; `receipts` says which hospitals confirmed the final model."""
    lines = folder.metrics()
    model = state.result(config)
    sha256 = parameters_sha256(model)
    content = {
        "schema": RESULT_SCHEMA,
        "run_id": state.run_id,
        "status": status.value,
        "engine": ENGINE,
        "seed": config.federation.seed,
        "private": config.claims_privacy,
        "data": {
            "name": config.federation.name,
            "task": config.data.task,
            "classes": list(config.data.classes),
            "unit": config.data.unit,
        },
        "model": {
            "name": config.model.name,
            "parameters": sum(array.size for array in model.values()),
            "sha256": sha256,
        },
        "rounds": state.round_number,
        "test": {},
        **validation_block(folder.path, model_sha256=sha256),
        "hospitals": _with_validation(
            _hospitals(config, state, receipts or {}, outsider_costs(config, state, lines)), folder
        ),
        "wire": _wire(lines, state),
        "time": _time(lines, wall_s),
    }
    write_json_atomically(folder.path / RESULT, content)


def write_model(folder: RunFolder, config: FederationConfig, state: RunState) -> None:
    """Write the final model, and model.json with all that is needed to use it."""
    model = state.result(config)
    sha256 = parameters_sha256(model)
    write_safetensors(folder.path / MODEL, model)
    description = {
        "schema": RESULT_SCHEMA,
        "wire_schema": SCHEMA_VERSION,
        "run_id": state.run_id,
        "rounds": state.round_number,
        "task": config.data.task,
        "loss": config.training.loss,
        "classes": list(config.data.classes),
        "spec": config.model_spec.model_dump(mode="json", by_alias=True),
        "preprocessing": Preprocessing(
            image_size=config.data.image_size, channels=config.data.channels
        ).to_dict(),
        "parameters": sum(array.size for array in model.values()),
        "sha256": sha256,
        "final_model": config.server.final_model,
        **model_numbers(folder.path, model_sha256=sha256),
        "privacy": _privacy(config, state, outsider_costs(config, state, folder.metrics())),
    }
    write_json_atomically(folder.path / MODEL_DESCRIPTION, description)


def write_card(folder: RunFolder) -> None:
    """Write the model card from what the run folder says, result.json included."""
    write_bytes_atomically(folder.path / MODEL_CARD, model_card(read_run(folder.path)).encode())


def _hospitals(
    config: FederationConfig,
    state: RunState,
    receipts: Mapping[str, bool],
    outsider: Mapping[str, OutsiderCost],
) -> list[dict[str, Any]]:
    claims = config.claims_privacy
    return [
        {
            "name": name,
            "enrolled_patients": totals.enrolled_patients,
            "epsilon": totals.epsilon if claims else None,
            "epsilon_complete": totals.epsilon_complete if claims else None,
            "epsilon_understated": totals.understated if claims else None,
            **_outsider_fields(outsider.get(name)),
            "delta": totals.delta if claims else None,
            "noise_multiplier": totals.noise_multiplier if claims else None,
            "sample_rate": config.privacy.sampling_rate if claims else None,
            "steps": totals.steps,
            "rounds": totals.rounds,
            "releases": totals.releases,
            "model_received": receipts.get(name, False),
            "test": {},
        }
        for name, totals in sorted(state.hospitals.items())
    ]


def _with_validation(entries: list[dict[str, Any]], folder: RunFolder) -> list[dict[str, Any]]:
    """Beside what training has cost: what the evaluations have cost each hospital's validation patients."""
    costs = validation_costs(folder.path)
    nothing = {"validation_epsilon": None, "validation_epsilon_complete": True}
    return [entry | costs.get(entry["name"], nothing) for entry in entries]


def _outsider_fields(cost: OutsiderCost | None) -> dict[str, Any]:
    """The epsilon against somebody who sees the final model only; None where nothing is claimed."""
    return {
        "epsilon_outsider": cost.epsilon if cost else None,
        "epsilon_outsider_proven": cost.is_proven if cost else None,
        "epsilon_outsider_reason": cost.reason if cost else None,
    }


def _privacy(
    config: FederationConfig, state: RunState, outsider: Mapping[str, OutsiderCost]
) -> dict[str, Any]:
    """The claim that travels with the model; without one it says so and holds no number.

    `epsilon` is None as long as a hospital may have charged more than this server knows.
    """
    if not config.claims_privacy:
        return {"private": False, "epsilon": None}
    spent = {
        name: {
            "epsilon": totals.epsilon,
            "delta": totals.delta,
            "epsilon_complete": totals.epsilon_complete,
            **_outsider_fields(outsider.get(name)),
        }
        for name, totals in sorted(state.hospitals.items())
        if totals.releases or not totals.epsilon_complete
    }
    is_complete = all(entry["epsilon_complete"] for entry in spent.values())
    known = [entry["epsilon"] for entry in spent.values() if entry["epsilon"] is not None]
    sure = all(e["epsilon_outsider_proven"] or e["epsilon_complete"] for e in spent.values())
    seen = [e["epsilon_outsider"] for e in spent.values() if e["epsilon_outsider"] is not None]
    return {
        "private": True,
        "unit": config.data.unit,
        "neighbouring_relation": NEIGHBOURING_RELATION,
        "epsilon": max(known) if is_complete and known and len(known) == len(spent) else None,
        "epsilon_complete": is_complete,
        "epsilon_outsider": max(seen) if sure and seen and len(seen) == len(spent) else None,
        "hospitals": spent,
    }


def _wire(lines: Sequence[Mapping[str, Any]], state: RunState) -> dict[str, int]:
    """Bytes of the training rounds, both ways, and what the aggregated deltas would need as plain float32."""
    asked = [line for line in lines if "hospital" in line]
    aggregated = sum(line["outcome"] == "aggregated" for line in asked)
    return {
        "bytes_up": sum(line["bytes_up"] for line in asked),
        "bytes_down": sum(line["bytes_down"] for line in asked),
        "bytes_up_float32": 4 * aggregated * sum(array.size for array in state.weights.values()),
    }


def _time(lines: Sequence[Mapping[str, Any]], wall_s: float) -> dict[str, float]:
    """Seconds: whole run, slowest training summed over rounds, and the median rest of a round."""
    slowest, overheads = 0.0, []
    of_round: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        if "hospital" in line:
            of_round.setdefault(line["round"], []).append(line)
    for closed in (line for line in lines if "closed" in line):
        mine = of_round.get(closed["round"], [])
        training_s = max((_training_s(line) for line in mine), default=0.0)
        began = min((line["sent"] for line in mine), default=closed["closed"])
        slowest += training_s
        overheads.append(closed["closed"] - began - training_s)
    return {
        "wall_s": wall_s,
        "train_s": slowest,
        "overhead_s_per_round": statistics.median(overheads) if overheads else 0.0,
    }


def _training_s(line: Mapping[str, Any]) -> float:
    """A hospital's own clock, kept within the time it had: a sealed answer took none of this round."""
    started, ended, received = line["training_started"], line["training_ended"], line["received"]
    if started is None or ended is None or received is None:
        return 0.0
    return float(min(max(ended - started, 0.0), received - line["sent"]))
