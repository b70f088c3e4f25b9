"""What rounding the updates to a grid costs in accuracy: the same runs with and without it.

content = measure_accuracy(seeds=5)
content["difference"]    mean test AUC at 8 bits less that of float32
"""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import FederationError
from common.flower_programs import python_module

_TIMEOUT_S = 900.0
_FLOAT32, _WHOLE = 32, 8


def measure_accuracy(
    *,
    seeds: int = 5,
    model: str = "cnn-flatten",
    hospitals: int = 5,
    rounds: int = 10,
    image_size: int = 28,
    data: Path | None = None,
) -> dict[str, Any]:
    """Test AUC of final models by seed, updates in float32 and in 8 bits; generated images without `data`.

    Reproducible runs: those of one seed have the same patients, samples and noise, so that nothing but the
    rounding tells them apart. Raises FederationError when a run does not complete.
    """
    flags: dict[str, object] = {
        "model": model,
        "hospitals": hospitals,
        "rounds": rounds,
        "image-size": image_size,
    }
    if data is not None:
        flags["data"] = str(data)
    auc: dict[int, list[float]] = {_FLOAT32: [], _WHOLE: []}
    for seed in range(seeds):
        for bits, found in auc.items():
            result = _result_of(flags | {"seed": seed, "set": f"wire.bits={bits}"})
            found.append(float(result["test"]["auc"]))
    differences = [whole - plain for plain, whole in zip(auc[_FLOAT32], auc[_WHOLE], strict=True)]
    return {
        "model": model,
        "parameters": result["model"]["parameters"],
        "hospitals": hospitals,
        "rounds": rounds,
        "seeds": seeds,
        "data": result["data"]["name"],
        "auc_float32": statistics.fmean(auc[_FLOAT32]),
        "auc_8_bits": statistics.fmean(auc[_WHOLE]),
        "difference": statistics.fmean(differences),
        "largest_difference": max(map(abs, differences)),
        "raw": {"auc": {str(bits): values for bits, values in auc.items()}},
    }


def _result_of(flags: Mapping[str, object]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        texts = [
            text for name, value in {**flags, "out": folder}.items() for text in (f"--{name}", str(value))
        ]
        command = python_module("simulations.cli", "run", *texts, "--reproducible", "--quiet")
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd=parent
            )
        except subprocess.TimeoutExpired:
            raise FederationError(f"a run took more than {_TIMEOUT_S:.0f} s") from None
        if done.returncode != 0:
            raise FederationError("the run to score did not complete", why=done.stderr.strip()[-500:])
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result
