"""What several models say about held-back patients; torch runs in a process of its own."""

from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.config import FederationConfig
from common.errors import FederationError

MODEL = "model.safetensors"
Said = dict[str, NDArray[np.float64]]
"""By the name of a run or split, (rows, classes)."""


def predict_test_split(held_back: Path, runs: Mapping[str, FederationConfig]) -> Said:
    """(rows, classes) of the test split for the final model of each run; the networks may differ.

    Raises FederationError when the process dies.
    """
    asked = {name: (held_back, config) for name, config in runs.items()}
    return {name: said["test"] for name, said in predict_splits(asked, ("test",)).items()}


def predict_splits(
    runs: Mapping[str, tuple[Path, FederationConfig]], splits: Sequence[str]
) -> dict[str, Said]:
    """By run and split what its final model says of the rows of its own file of held-back patients.

    Raises FederationError when the process dies.
    """
    from simulations.engines.processes import start_process, stop_process

    asked = [(str(held_back), config) for held_back, config in runs.values()]
    process, connection = start_process(serve, (asked, tuple(splits)), name="predictions")
    try:
        return {
            name: {
                split: np.frombuffer(connection.recv_bytes()).reshape(-1, len(config.data.classes))
                for split in splits
            }
            for name, (_, config) in runs.items()
        }
    except (EOFError, OSError):
        raise FederationError(
            "the models cannot be compared row by row",
            why="the process that asks them has died",
            fix="free memory and compare again",
        ) from None
    finally:
        stop_process(process, connection)


def serve(
    connection: Connection, runs: Sequence[tuple[str, FederationConfig]], splits: Sequence[str]
) -> None:
    """Send the probabilities of one run's final model after the other, split by split, as float64 bytes."""
    from common.models.registry import build_model, load_parameters
    from common.parameters import read_safetensors
    from common.preprocessing import Preprocessing
    from common.scoring import input_probabilities
    from common.tasks import task_of
    from simulations.engines.worker import prepare_process
    from simulations.held_back import HeldBack, read_held_back

    prepare_process(num_threads=1, deterministic=any(c.federation.reproducible for _, c in runs))
    read: tuple[str, HeldBack] | None = None
    for path, config in runs:
        if read is None or read[0] != path:
            read = (path, read_held_back(Path(path)))
        preprocessing = Preprocessing.of(config)
        task = task_of(config)
        model = build_model(config.model_spec).eval()
        load_parameters(model, read_safetensors(Path(config.runtime.run_folder) / MODEL))
        for split in splits:
            inputs = read[1].sets[split].inputs
            said = input_probabilities(model, task, inputs, preprocessing=preprocessing)
            connection.send_bytes(said.astype(np.float64).tobytes())
