"""The models that a hospital keeps: one folder for each run, checked against its manifest."""

import json
from pathlib import Path
from typing import Any

from common.files import manifest_problem


def received_models(folder: Path) -> list[dict[str, Any]]:
    """Run, model, hash and state of each received model, by run id."""
    if not folder.is_dir():
        return []
    return [_entry(run) for run in sorted(folder.iterdir()) if run.is_dir()]


def _entry(run: Path) -> dict[str, Any]:
    problem = manifest_problem(run)
    if problem is not None:
        return {"run_id": run.name, "model": None, "sha256": "", "path": str(run), "state": problem}
    description = json.loads((run / "model.json").read_text())
    return {
        "run_id": run.name,
        "model": description["spec"]["name"],
        "sha256": description["sha256"],
        "path": str(run / "model.safetensors"),
        "state": "whole",
    }
