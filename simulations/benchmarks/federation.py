"""What a federation costs beside training: bytes of an update, spooling and reduction, a round's overhead."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.config import ModelSpec
from common.errors import FederationError
from common.messages import (
    DELTA,
    EPSILON,
    NOISE_MULTIPLIER,
    NUM_EXAMPLES,
    STEPS,
    TRAINING_ENDED,
    TRAINING_STARTED,
    Envelope,
    RoundKey,
)
from common.parameters import Parameters, parameters_sha256
from simulations.benchmarks.interleaving import interleave

WIRE_MODELS = ("cnn-small", "cnn")
_ENGINE_TIMEOUT_S = 300.0


def measure_wire(models: Sequence[str] = WIRE_MODELS, *, image_size: int = 28) -> dict[str, Any]:
    """Bytes of one answer of a hospital, as it leaves by the door and as protobuf, by model."""
    from common.models.registry import initial_parameters

    sizes = {}
    for name in models:
        spec = ModelSpec(name=name, channels=1, image_size=image_size, num_outputs=2)
        sizes[name] = _size_of_update(initial_parameters(spec, seed=0))
    return sizes


def _size_of_update(delta: Parameters) -> dict[str, Any]:
    from flwr.app import Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from client.outbox import SealedAnswer
    from client.release import Door
    from common.messages import TRAIN, arrays_of
    from common.parameters import record_bytes
    from common.serialisation import message_to_bytes

    # `Message(...)` reads its sender from here, as under Flower's own engines.
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    key = RoundKey(run_id="bench", attempt=1, round_number=1, model_hash=parameters_sha256(delta))
    metrics: dict[str, float | int] = {
        NUM_EXAMPLES: 1000,
        TRAINING_STARTED: time.time(),
        TRAINING_ENDED: time.time(),
        NOISE_MULTIPLIER: 1.25,
        STEPS: 1,
        EPSILON: 0.5,
        DELTA: 1e-4,
    }
    with tempfile.TemporaryDirectory() as folder:
        door = Door(Path(folder) / "audit.jsonl")
        request = Message(RecordDict({}), 7, TRAIN)
        answer = door.update(request, Envelope(key=key), SealedAnswer(delta=delta, metrics=metrics))
    parameters = sum(array.size for array in delta.values())
    message = len(message_to_bytes(answer))
    return {
        "parameters": parameters,
        "bytes_float32": 4 * parameters,
        "bytes_arrays": record_bytes(arrays_of(answer.content)),
        "bytes_message": message,
        "ratio_to_float32": message / (4 * parameters),
    }


def measure_server(*, updates: int = 20, parameters: int = 1_000_000, repeats: int = 9) -> dict[str, Any]:
    """Seconds to spool and to reduce a round's updates, and numpy's `a += w * b` over the same bytes."""
    from server.aggregation import aggregate
    from server.spool import Spool

    generator = np.random.default_rng(0)
    deltas = [generator.standard_normal(parameters, dtype=np.float32) for _ in range(updates)]
    weights = [float(weight) for weight in generator.integers(100, 1000, updates)]
    names = [f"hospital-{number:03d}" for number in range(updates)]
    total = np.zeros(parameters, dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder) / "spool")

        def spool_all() -> None:
            for name, delta in zip(names, deltas, strict=True):
                spool.add(name, {"weights": delta})

        def reduce() -> None:
            aggregate(spool.vectors(names), weights)

        def numpy_in_place() -> None:
            total.fill(0)
            for weight, delta in zip(weights, deltas, strict=True):
                np.add(total, np.float32(weight) * delta, out=total)

        ways = {"spool": spool_all, "reduce": reduce, "numpy": numpy_in_place}
        seconds = interleave(ways, repeats=repeats, warm_up=1, budget_s=30.0)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    num_bytes = 4 * updates * parameters
    return {
        "updates": updates,
        "parameters": parameters,
        "bytes": num_bytes,
        "seconds_spool": medians["spool"],
        "seconds_reduce": medians["reduce"],
        "seconds_numpy": medians["numpy"],
        "bytes_per_second_reduce": num_bytes / medians["reduce"],
        "bytes_per_second_numpy": num_bytes / medians["numpy"],
        "throughput_ratio": medians["numpy"] / medians["reduce"],
        "raw": {"seconds": seconds},
    }


def measure_engine(*, hospitals: int = 3, rounds: int = 4, model: str = "cnn-small") -> dict[str, Any]:
    """A run of generated hospitals from the command to its result, in a process of its own.

    Raises FederationError with the command's last words when the run does not complete.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        scenario = {"hospitals": hospitals, "rounds": rounds, "model": model, "seed": 0, "out": folder}
        flags = [text for name, value in scenario.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "simulations.cli", "run", *flags, "--format", "json"]
        began = time.time()
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ENGINE_TIMEOUT_S, check=False, cwd=parent
        )
        wall_s = time.time() - began
        if done.returncode != 0:
            raise FederationError("the run to measure did not complete", why=done.stderr.strip()[-500:])
        result = json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    started = [line["training_started"] for line in lines if line.get("training_started") is not None]
    return {
        "engine": result["engine"],
        "hospitals": hospitals,
        "rounds": result["rounds"],
        "model": model,
        "seconds_command_to_result": wall_s,
        "seconds_to_first_training_step": min(started) - began,
        "overhead_s_per_round": result["time"]["overhead_s_per_round"],
        "train_s": result["time"]["train_s"],
        "bytes_up": result["wire"]["bytes_up"],
        "bytes_down": result["wire"]["bytes_down"],
    }
