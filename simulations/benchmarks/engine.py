"""What an engine costs from command to result: start-up, overhead, Ray beside it, a thousand hospitals.

Every run is a command of its own. Its clock starts before Python does.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from common.errors import ConfigError
from simulations.benchmarks.watched_run import WatchedRun, generated_images, watch_run

_TIMEOUT_S = 600.0
_LARGE_TIMEOUT_S = 3600.0


def measure_engine(
    *,
    hospitals: int = 5,
    rounds: int = 4,
    model: str = "cnn-small",
    engine: str = "embedded",
    repeats: int = 1,
) -> dict[str, Any]:
    """Runs of generated hospitals (400 patients each), private; seconds are medians over `repeats`.

    Raises FederationError with the command's last words when a run does not complete.
    """
    flags = {"hospitals": hospitals, "rounds": rounds, "model": model, "engine": engine, "seed": 0}
    runs = [watch_run(flags, timeout_s=_TIMEOUT_S) for _ in range(repeats)]
    result = runs[-1].result
    times = {
        "seconds_command_to_result": [run.wall_s for run in runs],
        "seconds_to_first_training_step": [run.first_training_s for run in runs],
        "overhead_s_per_round": [run.result["time"]["overhead_s_per_round"] for run in runs],
        "train_s": [run.result["time"]["train_s"] for run in runs],
    }
    return {
        "engine": result["engine"],
        "hospitals": hospitals,
        "rounds": result["rounds"],
        "model": model,
        **{name: statistics.median(values) for name, values in times.items()},
        "bytes_up": result["wire"]["bytes_up"],
        "bytes_down": result["wire"]["bytes_down"],
        "raw": times,
    }


def measure_against_ray(
    *, hospitals: int = 10, rounds: int = 5, model: str = "cnn-small", repeats: int = 1
) -> dict[str, Any]:
    """The same scenario on the embedded engine and on Ray in turn, from the command to the result.

    On Ray it is Flower's own way: a SuperLink in simulation mode, `flwr run` with the same ServerApp and
    ClientApp, Ray's actors with a core each. Images, partition, scoring and report are the same on both, so
    the ratio is that of what a person waits for. Raises FederationError.
    """
    flags = {"hospitals": hospitals, "rounds": rounds, "model": model, "seed": 0}
    runs: dict[str, list[WatchedRun]] = {"embedded": [], "ray": []}
    for _ in range(repeats):
        for engine, done in runs.items():
            done.append(watch_run(flags | {"engine": engine}, timeout_s=_TIMEOUT_S, memory=True))
    seconds = {engine: [run.wall_s for run in done] for engine, done in runs.items()}
    ratios = [ray / embedded for embedded, ray in zip(*seconds.values(), strict=True)]
    return {
        "hospitals": hospitals,
        "rounds": rounds,
        "model": model,
        "seconds_embedded": statistics.median(seconds["embedded"]),
        "seconds_ray": statistics.median(seconds["ray"]),
        "speedup": statistics.median(ratios),
        "bytes_peak_embedded": max(run.peak_bytes or 0 for run in runs["embedded"]),
        "bytes_peak_ray": max(run.peak_bytes or 0 for run in runs["ray"]),
        "raw": {
            "seconds": seconds,
            "seconds_to_first_training_step": {
                engine: [run.first_training_s for run in done] for engine, done in runs.items()
            },
        },
    }


def measure_scale(
    *,
    hospitals: Sequence[int] = (20, 100),
    rounds: int = 2,
    images: int = 20,
    model: str = "cnn-small",
    engine: str = "embedded",
) -> dict[str, Any]:
    """The same run with few and with many hospitals: `(100, 1000)` are the sizes of docs/benchmarks.md.

    Seconds per hospital and round are from the first message of round 1 to the close of the last round, over
    all updates; `ratio_per_hospital_round` is that of the largest run over the smallest. Memory is the peak
    of the sum over all processes, shared pages once. Raises FederationError, ConfigError for one size.
    """
    sizes = sorted(set(hospitals))
    if len(sizes) < 2:
        raise ConfigError("a comparison of sizes needs two", fix="name two numbers of hospitals")
    runs = {}
    for size in sizes:
        with generated_images(size, images=images) as data:
            flags = {"data": data, "hospitals": size, "rounds": rounds, "model": model, "engine": engine}
            runs[size] = watch_run(flags, timeout_s=_LARGE_TIMEOUT_S, memory=True)
    each = {size: run.seconds_per_hospital_round for size, run in runs.items()}
    return {
        "engine": engine,
        "hospitals": sizes[-1],
        "rounds": rounds,
        "images": images,
        "model": model,
        "bytes_peak": runs[sizes[-1]].peak_bytes,
        "ratio_per_hospital_round": each[sizes[-1]] / each[sizes[0]],
        "seconds_command_to_result": runs[sizes[-1]].wall_s,
        "raw": {
            str(size): {
                "seconds_per_hospital_round": each[size],
                "seconds_command_to_result": run.wall_s,
                "seconds_after_training": run.wall_s - run.closed_s[-1],
                "bytes_peak": run.peak_bytes,
                "processes": run.processes,
                "updates": run.hospital_rounds,
            }
            for size, run in runs.items()
        },
    }
