"""What several models say about the held-back test patients; torch runs in a process of its own."""

from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.config import FederationConfig
from common.errors import FederationError

_ROWS_AT_ONCE = 256


def predict_test_split(
    config: FederationConfig, held_back: Path, models: Mapping[str, Path]
) -> dict[str, NDArray[np.float64]]:
    """(rows, classes) of the test split for each model file; all models are of the network in `config`."""
    from simulations.engines.processes import start_process, stop_process

    process, connection = start_process(
        serve, (config, str(held_back), [str(path) for path in models.values()]), name="predictions"
    )
    try:
        said = [np.frombuffer(connection.recv_bytes()) for _ in models]
    except (EOFError, OSError):
        raise FederationError(
            "the models cannot be compared row by row",
            why="the process that asks them has died",
            fix="free memory and compare again",
        ) from None
    finally:
        stop_process(process, connection)
    classes = len(config.data.classes)
    return {name: values.reshape(-1, classes) for name, values in zip(models, said, strict=True)}


def serve(connection: Connection, config: FederationConfig, held_back: str, models: list[str]) -> None:
    """Send the probabilities of one model after the other as float64 bytes."""
    import torch

    from common.models.registry import build_model, load_parameters
    from common.parameters import read_safetensors
    from common.preprocessing import Preprocessing
    from common.tasks import make_task
    from simulations.engines.worker import prepare_process
    from simulations.held_back import read_held_back

    prepare_process(num_threads=1, deterministic=config.federation.reproducible)
    images = read_held_back(Path(held_back)).sets["test"].images
    preprocessing = Preprocessing(image_size=config.data.image_size, channels=config.data.channels)
    task = make_task(config.data.task, config.data.classes)
    model = build_model(config.model_spec).eval()
    for path in models:
        load_parameters(model, read_safetensors(Path(path)))
        outputs = []
        with torch.inference_mode():
            for start in range(0, len(images), _ROWS_AT_ONCE):
                rows = torch.from_numpy(preprocessing.standardise(images[start : start + _ROWS_AT_ONCE]))
                outputs.append(model(rows).numpy())
        connection.send_bytes(task.probabilities(np.concatenate(outputs)).astype(np.float64).tobytes())
