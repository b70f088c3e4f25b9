"""What a federation costs beside training: bytes of an update, spooling and reduction, a round's overhead."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.config import ModelSpec
from common.messages import (
    DELTA,
    ENCODINGS,
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
from common.quantisation import Grid, Levels
from server.spool import SpooledLevels, SpooledVector
from simulations.benchmarks.interleaving import interleave

WIRE_MODELS = ("cnn-small", "cnn")


def measure_wire(models: Sequence[str] = WIRE_MODELS, *, image_size: int = 28) -> dict[str, Any]:
    """Bytes of one answer of a hospital by model, the ledger's receipt included, as it leaves by the door.

    The update is noise of four spacings, as under privacy, in 8 bits; `bits` has the ways by bits.
    """
    from common.models.registry import initial_parameters

    sizes = {}
    for name in models:
        spec = ModelSpec(name=name, channels=1, image_size=image_size, num_outputs=2)
        template = initial_parameters(spec, seed=0)
        ways = {bits: _size_of_update(template, bits=bits) for bits in ENCODINGS}
        sizes[name] = ways[8] | {"bits": {str(bits): way for bits, way in ways.items()}}
    return sizes


def _size_of_update(template: Parameters, *, bits: int) -> dict[str, Any]:
    from flwr.app import Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from client.outbox import SealedAnswer
    from client.release import Door, encoded
    from common.messages import LARGEST_RECEIPT, TRAIN, arrays_of
    from common.parameters import record_bytes
    from common.privacy.randomness import ReproducibleRandomness
    from common.serialisation import message_to_bytes

    # `Message(...)` reads its sender from here, as under Flower's own engines.
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    generator = np.random.default_rng(0)
    delta = {name: generator.standard_normal(a.shape, dtype=np.float32) for name, a in template.items()}
    deviations = 4 if bits == 8 else 1
    grid = Grid(bits=bits, exponents=(0,) * len(delta)) if bits != 32 else None
    arrays = encoded(
        delta, (grid, deviations) if grid else None, ReproducibleRandomness(0, "bench"), round_number=1
    )
    key = RoundKey(run_id="bench", attempt=1, round_number=1, model_hash=parameters_sha256(delta))
    envelope = Envelope(key=key, encoding=ENCODINGS[bits])
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
        sealed = SealedAnswer(delta=arrays, metrics=metrics)
        answer = door.update(request, envelope, sealed, ledger_receipt=bytes(LARGEST_RECEIPT))
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
    """Seconds to spool and to reduce a round's updates, and numpy's `a += w * b` over the same bytes.

    Once for float32 updates, once for updates in whole numbers of 8 bits ("grid"). numpy has its updates in
    memory; the server reads them from the spool. Beside the whole numbers numpy goes over as many bytes of
    float32, its fastest case (`numpy_grid`), and over the int8 themselves (`numpy_int8`).
    """
    from server.aggregation import aggregate, mean_on_grid
    from server.spool import Spool

    generator = np.random.default_rng(0)
    deltas = [generator.standard_normal(parameters, dtype=np.float32) for _ in range(updates)]
    weights = [int(weight) for weight in generator.integers(100, 1000, updates)]
    names = [f"hospital-{number:03d}" for number in range(updates)]
    template, quarter = {"weights": (parameters,)}, parameters // 4
    total = np.empty(parameters, dtype=np.float32)
    levels = [_whole_numbers(delta) for delta in deltas]
    with tempfile.TemporaryDirectory() as folder:
        floats, whole = Spool(Path(folder) / "float32", template), Spool(Path(folder) / "grid", template)

        def spool(target: Spool, content: Sequence[Parameters | Levels]) -> None:
            target.clear()
            for name, update in zip(names, content, strict=True):
                target.add(name, update)

        def reduce() -> None:
            with floats.opened(names) as vectors:
                aggregate([v for v in vectors if isinstance(v, SpooledVector)], weights)

        def reduce_grid() -> None:
            with whole.opened(names) as vectors:
                levels = [v for v in vectors if isinstance(v, SpooledLevels)]
                mean_on_grid(levels, total_weight=sum(weights), scales=[(slice(0, parameters), 0.5)])

        ways = {
            "spool": lambda: spool(floats, [{"weights": delta} for delta in deltas]),
            "reduce": reduce,
            "numpy": lambda: _in_place(total, deltas, weights),
            "spool_grid": lambda: spool(whole, levels),
            "reduce_grid": reduce_grid,
            "numpy_grid": lambda: _in_place(total[:quarter], [d[:quarter] for d in deltas], weights),
            "numpy_int8": lambda: _in_place(total, [one.fitting for one in levels], weights),
        }
        seconds = interleave(ways, repeats=repeats, warm_up=1, budget_s=30.0)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    num_bytes = 4 * updates * parameters
    return {
        "updates": updates,
        "parameters": parameters,
        "bytes": num_bytes,
        **{f"seconds_{name}": value for name, value in medians.items()},
        "bytes_per_second_reduce": num_bytes / medians["reduce"],
        "bytes_per_second_numpy": num_bytes / medians["numpy"],
        "throughput_ratio": medians["numpy"] / medians["reduce"],
        "bytes_grid": num_bytes // 4,
        "throughput_ratio_grid": medians["numpy_grid"] / medians["reduce_grid"],
        "throughput_ratio_grid_int8": medians["numpy_int8"] / medians["reduce_grid"],
        "raw": {"seconds": seconds},
    }


def _whole_numbers(delta: npt.NDArray[np.float32]) -> Levels:
    """An update as it lies on a grid with a spacing of a tenth of its noise, a few numbers beyond it."""
    fitting = np.clip(np.rint(10 * delta), -127, 127).astype(np.int8)
    places = np.arange(0, len(delta), 2000, dtype=np.uint32)
    fitting[places] = 127
    return Levels(fitting=fitting, places=places, rest=np.ones(len(places), dtype=np.int32))


def _in_place(
    total: npt.NDArray[np.float32], arrays: Sequence[npt.NDArray[Any]], weights: Sequence[int]
) -> None:
    total.fill(0)
    for weight, array in zip(weights, arrays, strict=True):
        total += np.float32(weight) * array
