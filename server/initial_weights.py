"""The first global weights: from a file, or made from the seed by a short child process.

The server itself imports no torch; the child does, and is gone before round 1.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from common.config import FederationConfig
from common.errors import ModelError
from common.parameters import Parameters, read_safetensors

_PROGRAM = "common.models.initial"
_TIMEOUT_S = 300


def initial_weights(config: FederationConfig) -> Parameters:
    """Weights before round 1, in name order. Raises ModelError or WireError."""
    if config.runtime.initial_weights:
        return read_safetensors(Path(config.runtime.initial_weights))
    with tempfile.TemporaryDirectory(prefix="initial-weights-") as folder:
        file = Path(folder) / "initial.safetensors"
        _make(config, file)
        return read_safetensors(file)


def _make(config: FederationConfig, file: Path) -> None:
    spec = config.model_spec.model_dump_json(by_alias=True)
    command = [sys.executable, "-m", _PROGRAM, "--spec", spec, "--out", str(file)]
    command += ["--seed", str(config.federation.seed)]
    # The child finds `common` where this process found it, wherever that is (an app bundle, a checkout).
    root = Path(__file__).resolve().parents[1]
    try:
        child = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"making the initial weights took more than {_TIMEOUT_S} s") from None
    if child.returncode != 0:
        raise ModelError(
            f"the initial weights of model {config.model.name!r} cannot be made",
            why=child.stderr.strip()[-2000:],
            fix="choose another model, or name a safetensors file as runtime.initial-weights",
        )
