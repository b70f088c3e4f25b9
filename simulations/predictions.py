"""What several models say about the held-back test patients; torch runs in a process of its own."""

from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.config import FederationConfig
from common.errors import FederationError

MODEL = "model.safetensors"


def predict_test_split(
    held_back: Path, runs: Mapping[str, FederationConfig]
) -> dict[str, NDArray[np.float64]]:
    """(rows, classes) of the test split for the final model of each run; the networks may differ.

    Raises FederationError when the process dies.
    """
    from simulations.engines.processes import start_process, stop_process

    process, connection = start_process(serve, (str(held_back), list(runs.values())), name="predictions")
    try:
        said = {
            name: np.frombuffer(connection.recv_bytes()).reshape(-1, len(config.data.classes))
            for name, config in runs.items()
        }
    except (EOFError, OSError):
        raise FederationError(
            "the models cannot be compared row by row",
            why="the process that asks them has died",
            fix="free memory and compare again",
        ) from None
    finally:
        stop_process(process, connection)
    return said


def serve(connection: Connection, held_back: str, configs: list[FederationConfig]) -> None:
    """Send the probabilities of one run's final model after the other as float64 bytes."""
    from common.models.registry import build_model, load_parameters
    from common.parameters import read_safetensors
    from common.preprocessing import Preprocessing
    from common.scoring import image_probabilities
    from common.tasks import task_of
    from simulations.engines.worker import prepare_process
    from simulations.held_back import read_held_back

    prepare_process(num_threads=1, deterministic=any(c.federation.reproducible for c in configs))
    images = read_held_back(Path(held_back)).sets["test"].images
    for config in configs:
        preprocessing = Preprocessing(image_size=config.data.image_size, channels=config.data.channels)
        task = task_of(config)
        model = build_model(config.model_spec).eval()
        load_parameters(model, read_safetensors(Path(config.runtime.run_folder) / MODEL))
        said = image_probabilities(model, task, images, preprocessing=preprocessing)
        connection.send_bytes(said.astype(np.float64).tobytes())
