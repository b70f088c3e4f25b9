"""How long a person waits before anything is trained: commands, images, and the noise that fits a budget.

content = measure_startup(repeats=3)
content["decode"]["ratio_second_to_loop"]
"""

import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from simulations.benchmarks.interleaving import interleave

PROGRAMS: Mapping[str, str] = {
    "flower-server": "server.cli",
    "flower-client": "client.cli",
    "flower-simulate": "simulations.cli",
}
BUDGETS: Sequence[Mapping[str, float]] = (
    {"sampling_rate": 0.5, "steps": 20, "epsilon": 3.0, "delta": 1e-3},
    {"sampling_rate": 0.1, "steps": 200, "epsilon": 1.0, "delta": 1e-4},
    {"sampling_rate": 0.01, "steps": 2000, "epsilon": 2.0, "delta": 1e-5},
)
"""What noise is solved for; the noise multipliers are 2.477, 4.645 and 1.150."""
_SIDE = 64
_TIMEOUT_S = 300.0

# In a process of its own: what an import costs, and that nothing is known yet.
_SOLVE = """
import json, sys, time

start = time.process_time()
from dp_accounting.pld import privacy_loss_distribution
from common.privacy.calibration import solve_noise_multiplier
imported = time.process_time()
noise = solve_noise_multiplier(histories=[], **json.loads(sys.argv[1]))
print(json.dumps({"import": imported - start, "solve": time.process_time() - imported, "noise": noise}))
"""


def measure_startup(
    *, repeats: int = 3, programs: Sequence[str] = tuple(PROGRAMS), patients: int = 300, image_size: int = 224
) -> dict[str, Any]:
    """Seconds of each `--help` and `status`, of decoding and mapping images, and of solving for noise.

    `commands` has wall and processor seconds of whole processes; `decode` those of generated PNG films beside
    a plain Pillow loop over the same files on one core; `solver` processor seconds of new processes. Medians;
    `raw` has every call.
    """
    with tempfile.TemporaryDirectory() as folder:
        commands = dict(_commands(programs, Path(folder)))
        walls, cores = _measure_commands(commands, repeats=repeats)
        decode, decoded = _measure_decoding(
            Path(folder), repeats=repeats, patients=patients, image_size=image_size
        )
    solver, solved = _measure_solver(repeats=repeats)
    return {
        "commands": {
            name: {"seconds": statistics.median(walls[name]), "cpu_seconds": statistics.median(cores[name])}
            for name in commands
        },
        "seconds_slowest_command": max(map(statistics.median, walls.values()), default=0.0),
        "decode": decode,
        "solver": solver,
        "raw": {"commands": walls, "commands_cpu": cores, "decode": decoded, "solver": solved},
    }


def help_commands(program: str) -> Iterator[list[str]]:
    """`--help` of a program and of each of its commands, at any depth, as arguments."""
    import typer

    def walk(command: Any, path: list[str]) -> Iterator[list[str]]:
        yield [*path, "--help"]
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, [*path, name])

    app = importlib.import_module(PROGRAMS[program]).app
    return walk(typer.main.get_command(app), [])


def _commands(programs: Sequence[str], folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and command line of what is timed; `status` is that of a new federation and a new hospital."""
    for program in programs:
        for arguments in help_commands(program):
            yield " ".join([program, *arguments]), [sys.executable, "-m", PROGRAMS[program], *arguments]
    new = {
        "flower-server": ["--name", "bench", "--address", "localhost:8443"],
        "flower-client": ["--name", "bench", "--patients", "100", "--data", str(folder)],
    }
    for program, settings in new.items():
        if program not in programs:
            continue
        made = folder / program
        command = [sys.executable, "-m", PROGRAMS[program]]
        subprocess.run([*command, "init", str(made), *settings], check=True, capture_output=True)
        where = ["--dir", str(made)] if program == "flower-server" else [str(made)]
        yield f"{program} status", [*command, "status", *where]


def _measure_commands(
    commands: Mapping[str, Sequence[str]], *, repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and processor seconds of every call, by command; the first, from a cold disk, does not count."""
    cores: dict[str, list[float]] = {name: [] for name in commands}

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            before = _children_s()
            subprocess.run(commands[name], capture_output=True, check=False, timeout=_TIMEOUT_S)
            cores[name].append(_children_s() - before)

        return run

    if not commands:
        return {}, {}
    walls = interleave({name: call(name) for name in commands}, repeats=repeats, warm_up=1, at_least=1)
    return walls, {name: seconds[1:] for name, seconds in cores.items()}


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _measure_decoding(
    folder: Path, *, repeats: int, patients: int, image_size: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    from client.images.dataset import read_hospital_images
    from common.hospital_config import DataConfig
    from common.preprocessing import Preprocessing
    from simulations.generated_data import write_generated_data

    data = write_generated_data(
        folder / "films",
        layout="folders",
        hospitals=1,
        patients_per_hospital=patients,
        image_size=image_size,
        seed=0,
    )
    files = sorted(data.rglob("*.png"))
    _let_settle(files)
    cache = folder / "cache"

    def read() -> None:
        read_hospital_images(
            DataConfig(path=str(data)),
            preprocessing=Preprocessing(image_size=_SIDE, channels=1),
            classes=None,
            cache_folder=cache,
        )

    def first() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        read()

    # A `second` always follows a `first`.
    ways: dict[str, Callable[[], None]] = {
        "loop": partial(_plain_loop, files),
        "first": first,
        "second": read,
    }
    raw: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            raw[name].append(time.perf_counter() - start)
    raw = {name: seconds[1:] for name, seconds in raw.items()}
    middle = {name: statistics.median(seconds) for name, seconds in raw.items()}
    content = {
        "images": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "bytes_mapped": sum(path.stat().st_size for path in cache.rglob("*.npy")),
        **{f"seconds_{name}": seconds for name, seconds in middle.items()},
        "ratio_first_to_loop": middle["first"] / middle["loop"],
        "ratio_second_to_loop": middle["second"] / middle["loop"],
    }
    return content, raw


def _plain_loop(files: Sequence[Path]) -> None:
    """What a training script does in every start."""
    import numpy as np
    from PIL import Image

    for path in files:
        with Image.open(path) as image:
            np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


def _let_settle(files: Sequence[Path]) -> None:
    """Wait until the files are older than what a hospital takes for being written still."""
    newest = max(path.stat().st_ctime for path in files)
    time.sleep(max(0.0, newest + 2.1 - time.time()))


def _measure_solver(*, repeats: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    calls = []
    for _ in range(repeats):
        for number, budget in enumerate(BUDGETS):
            command = [sys.executable, "-c", _SOLVE, json.dumps(budget)]
            done = subprocess.run(
                command, check=True, capture_output=True, env=environment, timeout=_TIMEOUT_S
            )
            calls.append({"case": number, **json.loads(done.stdout)})
    cases = [
        {
            **budget,
            "noise_multiplier": next(call["noise"] for call in calls if call["case"] == number),
            "cpu_seconds": statistics.median(call["solve"] for call in calls if call["case"] == number),
        }
        for number, budget in enumerate(BUDGETS)
    ]
    imports = statistics.median(call["import"] for call in calls)
    return {"cpu_seconds_import": imports, "cases": cases}, calls
