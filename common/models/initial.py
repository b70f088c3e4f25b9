"""Write the initial weights of a model, in a process of its own because the server imports no torch.

python -m common.models.initial --seed 1 --out initial.safetensors \
    --spec '{"name": "cnn-small", "channels": 1, "image-size": 28, "num-outputs": 2}'
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save

from common.config import ModelSpec
from common.errors import ConfigError, FederationError
from common.files import write_bytes_atomically
from common.models.registry import initial_parameters
from common.settings import parse


def write_initial_parameters(spec: ModelSpec, *, seed: int, path: Path) -> None:
    """Write the weights of (spec, seed) as safetensors: the whole file or none."""
    write_bytes_atomically(path, save(initial_parameters(spec, seed)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the file is written, 2 with the reason on stderr when it cannot be."""
    parser = argparse.ArgumentParser(description="Write initial weights.")
    parser.add_argument("--spec", required=True, help="the model as JSON, keys as in ModelSpec")
    parser.add_argument("--seed", required=True, type=int, help="equal seeds give equal bits")
    parser.add_argument("--out", required=True, type=Path, help="safetensors file to write")
    options = parser.parse_args(arguments)
    try:
        write_initial_parameters(_read_spec(options.spec), seed=options.seed, path=options.out)
    except FederationError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _read_spec(text: str) -> ModelSpec:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError("--spec is not JSON", why=str(error), fix="write an object as in --help") from None
    return parse(ModelSpec, values, source="--spec")


if __name__ == "__main__":
    sys.exit(main())
