"""Checkpoints: `checkpoints/<round>/`, written whole or not at all, verified before they are believed."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, WireError
from common.files import manifest_problem, sync_folder, write_json_atomically, write_manifest
from common.parameters import Parameters, read_safetensors, write_safetensors
from server.run_state import RunState
from server.server_optimizer import OptimizerState
from server.totals import totals_from

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
SCHEMA = 1
_FILES = (MODEL, OPTIMIZER, STATE)

log = logging.getLogger(__name__)


def write_checkpoint(folder: Path, state: RunState, *, keep: int) -> None:
    """Add `folder/<round>` and drop all but the newest `keep`.

    Written aside, hashed, flushed, renamed: a crash or a full disk leaves the older ones as they were.
    Raises CheckpointError when the disk does not take it.
    """
    aside = folder / f".{state.round_number}.{os.getpid()}.tmp"
    try:
        _remove(aside)
        aside.mkdir(parents=True)
        write_safetensors(aside / MODEL, state.weights)
        write_safetensors(aside / OPTIMIZER, _optimizer_arrays(state))
        write_json_atomically(aside / STATE, _state_fields(state))
        write_manifest(aside, _FILES)
        _put_in_place(aside, folder / str(state.round_number))
    except OSError as error:
        _remove(aside)
        raise CheckpointError(
            f"the checkpoint of round {state.round_number} cannot be written",
            why=error.strerror or type(error).__name__,
            fix="free disk space, then resume: the checkpoint before it is whole",
        ) from None
    for old in _rounds(folder)[keep:]:
        _remove(folder / str(old))


def restore_newest(folder: Path) -> RunState | None:
    """Read the newest whole checkpoint; None when there never was one.

    A damaged one is passed over with a warning. Raises CheckpointError when all are damaged: starting
    over silently would train, and charge, every round again.
    """
    for leftover in folder.glob(".*.tmp"):
        _remove(leftover)
    rounds = _rounds(folder)
    for number in rounds:
        try:
            return _read(folder / str(number))
        except CheckpointError as error:
            log.warning("checkpoint %d is passed over: %s", number, error.why)
    if rounds:
        raise CheckpointError(
            "no checkpoint of this run is whole",
            why=f"checked rounds {', '.join(map(str, rounds))}",
            fix="restore the checkpoints folder from a backup, or start a new run",
        )
    return None


def _read(folder: Path) -> RunState:
    if problem := manifest_problem(folder, required=_FILES):
        raise CheckpointError("the checkpoint is damaged", why=problem)
    try:
        weights = read_safetensors(folder / MODEL)
        arrays = read_safetensors(folder / OPTIMIZER)
        return _state(json.loads((folder / STATE).read_text()), weights, arrays)
    except (WireError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "the checkpoint cannot be read", why=str(error) or type(error).__name__
        ) from None


def _state_fields(state: RunState) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "run_id": state.run_id,
        "round": state.round_number,
        "model_sha256": state.model_sha256,
        "plan": dict(state.plan),
        "hospitals": {name: asdict(totals) for name, totals in sorted(state.hospitals.items())},
        "wall_s": state.wall_s,
        "grid": list(state.grid),
    }


def _state(fields: Mapping[str, Any], weights: Parameters, arrays: Parameters) -> RunState:
    if fields["schema"] != SCHEMA:
        raise ValueError(f"state.json has schema {fields['schema']}, this release reads {SCHEMA}")
    state = RunState(
        run_id=fields["run_id"],
        round_number=fields["round"],
        weights=weights,
        plan=fields["plan"],
        optimizer=OptimizerState(first_moment=_part(arrays, "first"), second_moment=_part(arrays, "second")),
        average=_part(arrays, "average"),
        hospitals={name: totals_from(totals) for name, totals in fields["hospitals"].items()},
        wall_s=fields["wall_s"],
        grid=tuple(int(exponent) for exponent in fields.get("grid", ())),
    )
    if state.model_sha256 != fields["model_sha256"]:
        raise ValueError("model.safetensors is not the model of state.json")
    return state


def _optimizer_arrays(state: RunState) -> Parameters:
    parts = {
        "first": state.optimizer.first_moment,
        "second": state.optimizer.second_moment,
        "average": state.average,
    }
    return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def _part(arrays: Parameters, part: str) -> Parameters:
    prefix = f"{part}/"
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _rounds(folder: Path) -> list[int]:
    """Round numbers that have a folder, newest first."""
    names = (path.name for path in folder.glob("*") if path.is_dir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _put_in_place(aside: Path, final: Path) -> None:
    if final.exists():  # a damaged one of this round, passed over when the run was restored
        _remove(final)
    os.rename(aside, final)
    sync_folder(final.parent)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
