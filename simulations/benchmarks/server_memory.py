"""Memory of a real server while many hospitals take in a large model and all send their updates at once.

python -m simulations.benchmarks.server_memory --hospitals 100 --parameters 25000000    prints JSON, on Linux

Everything on the server's side is real: supervisor, SuperLink, front and server process over TLS on loopback.
The hospitals are played by one light process with real keys and the real Fleet calls. Counted is the
proportional set size (PSS) of the server's processes, all added up, above what the same processes need while
they are idle, before any hospital has come and with a model of a thousand parameters.
"""

import argparse
import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.child_process import ChildProcess
from common.config import EvaluationSection, FederationSection, WireSection
from common.enrolment import ENROLMENT
from common.errors import FederationError
from common.flower_programs import flower_environment, free_ports, python_module
from common.node_keys import load_public_key, make_key
from common.parameters import write_safetensors
from common.server_settings import RuntimeSection, ServerSection
from server.provisioning.enrolments import enrol_hospital
from server.provisioning.new_federation import make_federation
from server.provisioning.operator_config import NetworkSection, OperatorConfig, OperatorFolder
from server.run_folder import METRICS
from simulations.benchmarks.played_hospitals import KEY, SHAPES
from simulations.benchmarks.process_memory import Memory

ENROLLED = 1000
_IDLE_PARAMETERS = 1000
_IDLE_S, _START_S, _END_S = 5.0, 120.0, 20.0
_STILL_BYTES = 3_000_000
_LARGEST_SHARE = 0.6
"""Of the parameters that stand in one array: the hard case, a whole array is handled at once."""


def measure_server_memory(
    *,
    hospitals: int = 20,
    parameters: int = 2_000_000,
    rounds: int = 2,
    bits: Literal[8, 4, 32] = 8,
    timeout_s: float = 600.0,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Peak of the server's memory above its idle processes, in bytes and in models; seconds of each round.

    `folder` must have room on its disk for three times the updates of a round. Raises FederationError when
    the server does not complete the run.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="server-memory-") as place:
        idle = _idle(Path(place) / "idle")
        with _served(Path(place) / "full", hospitals, parameters, rounds, bits=bits) as (
            operator,
            server,
            memory,
        ):
            players = _players(operator)
            try:
                players.start()
                _await_end(server, timeout_s=timeout_s)
            finally:
                players.stop(patience_s=1.0)
            told = [line for line in _metrics(operator) if "closed" in line]
            asked = [line for line in _metrics(operator) if "hospital" in line]
            disk = _largest_database(operator)
    model = 4 * parameters
    return {
        "hospitals": hospitals,
        "parameters": parameters,
        "rounds": rounds,
        "bits": bits,
        "bytes_model": model,
        "bytes_idle": sum(idle.values()),
        "bytes_peak": sum(memory.peak.values()),
        "bytes_above_idle": sum(memory.peak.values()) - sum(idle.values()),
        "models_above_idle": (sum(memory.peak.values()) - sum(idle.values())) / model,
        "updates_aggregated": [line["aggregated"] for line in told],
        "seconds_rounds": _seconds(told, asked),
        "bytes_up_of_one": max((line["bytes_up"] for line in asked), default=0),
        "bytes_database": disk,
        "raw": {
            "idle": idle,
            "at_peak": memory.peak,
            "each_peak": memory.each_peak,
            "phases": _phases(memory),
        },
    }


def some_shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """A model of this size: one very large array, a handful of others."""
    large = int(_LARGEST_SHARE * parameters)
    shapes: dict[str, tuple[int, ...]] = {"dense.weight": (large,)}
    rest, count = parameters - large, 8
    for number in range(count):
        size = rest // count if number < count - 1 else rest - (count - 1) * (rest // count)
        shapes[f"block{number}.weight"] = (size,)
    return shapes


def _idle(place: Path) -> dict[str, int]:
    """PSS of the processes of a server that waits for its first hospital."""
    with _served(place, 1, _IDLE_PARAMETERS, 1) as (operator, server, memory):
        _await(lambda: _is_still(operator, memory), server, within_s=_START_S)
    return memory.samples[-1][1]


def _is_still(operator: OperatorFolder, memory: Memory) -> bool:
    """Whether the run has begun, and its processes have neither grown nor shrunk lately."""
    lately = [sample for at, sample in memory.samples if at > memory.samples[-1][0] - _IDLE_S]
    sums = [sum(sample.values()) for sample in lately]
    everybody = {"supervisor", "superlink", "front", "server process"}
    if not all(everybody <= sample.keys() for sample in lately):
        return False
    run = operator.run_folder()
    has_begun = run is not None and (run / "checkpoints" / "0").is_dir()
    return has_begun and max(sums) - min(sums) < _STILL_BYTES


@contextmanager
def _served(
    place: Path, hospitals: int, parameters: int, rounds: int, *, bits: Literal[8, 4, 32] = 8
) -> Iterator[tuple[OperatorFolder, ChildProcess, Memory]]:
    """A real server that is open to its enrolled hospitals, and its memory; gone afterwards."""
    operator = _provisioned(place, hospitals, parameters, rounds, bits=bits)
    command = python_module("server.cli", "start", str(operator.path))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = ChildProcess(command, log=place / "server.log", env=environment, name="server")
    server.start()
    memory = Memory(root=server.pid)
    watcher = threading.Thread(target=memory.watch, daemon=True)
    watcher.start()
    try:
        _await(lambda: "hospitals may connect" in _said(server), server, within_s=_START_S)
        yield operator, server, memory
    finally:
        memory.end()
        watcher.join()
        server.stop(patience_s=_END_S)
        if keep := os.environ.get("SERVER_MEMORY_KEEP"):
            shutil.copytree(operator.logs, Path(keep) / place.name, dirs_exist_ok=True)
            shutil.copy(place / "server.log", Path(keep) / place.name)
            if (place / "players.log").exists():
                shutil.copy(place / "players.log", Path(keep) / place.name)


def _provisioned(
    place: Path, hospitals: int, parameters: int, rounds: int, *, bits: Literal[8, 4, 32]
) -> OperatorFolder:
    shapes = some_shapes(parameters)
    generator = np.random.default_rng(1)
    scale = np.float32(0.01)
    place.mkdir(parents=True)
    write_safetensors(
        place / "initial.safetensors",
        {name: scale * generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()},
    )
    listen, superlink, health = free_ports(3)
    address = f"127.0.0.1:{listen}"
    config = OperatorConfig(
        federation=FederationSection(name="memory", rounds=rounds),
        evaluation=EvaluationSection(at_end=False),
        wire=WireSection(bits=bits),
        server=ServerSection(quorum=hospitals, patience_s=3000.0, deadline_s=3000.0),
        runtime=RuntimeSection(
            initial_weights=str(place / "initial.safetensors"), expected_hospitals=hospitals
        ),
        network=NetworkSection(
            address=address,
            listen=address,
            superlink_port=superlink,
            health_port=health,
            max_connections=max(400, 8 * hospitals),
        ),
    )
    operator = make_federation(place / "operator", config)
    played = place / "played"
    for number in range(hospitals):
        home = played / f"hospital-{number:03d}"
        home.mkdir(parents=True)
        make_key(home / KEY, home / "hospital.pub", comment=home.name)
        key = load_public_key(home / "hospital.pub")
        _, _, enrolment = enrol_hospital(operator, name=home.name, key=key, enrolled_patients=ENROLLED)
        shutil.copyfile(enrolment, home / ENROLMENT)
    (played / SHAPES).write_text(json.dumps(shapes))
    return operator


def _players(operator: OperatorFolder) -> ChildProcess:
    place = operator.path.parent
    command = python_module("simulations.benchmarks.played_hospitals", str(place / "played"))
    environment = flower_environment(place / "flower", OMP_NUM_THREADS="1", FLWR_LOG_LEVEL="ERROR")
    return ChildProcess(command, log=place / "players.log", env=environment, name="played hospitals")


def _await_end(server: ChildProcess, *, timeout_s: float) -> None:
    _await(lambda: not server.is_running, server, within_s=timeout_s, may_end=True)
    if server.poll() != 0:
        raise FederationError(
            f"the measured server ended with status {server.poll()}", why=_said(server)[-500:]
        )


def _await(condition: Any, server: ChildProcess, *, within_s: float, may_end: bool = False) -> None:
    give_up_at = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > give_up_at or not may_end and not server.is_running:
            raise FederationError("the measured server is not where it should be", why=_said(server)[-500:])
        time.sleep(0.1)


def _said(server: ChildProcess) -> str:
    return server.log.read_text(errors="replace") if server.log.exists() else ""


def _metrics(operator: OperatorFolder) -> list[dict[str, Any]]:
    run = operator.run_folder()
    if run is None or not (run / METRICS).exists():
        return []
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def _largest_database(operator: OperatorFolder) -> int:
    return sum(path.stat().st_size for path in operator.state.glob("superlink.db*"))


def _seconds(told: Sequence[dict[str, Any]], asked: Sequence[dict[str, Any]]) -> list[float]:
    """From the departure of each round's first message to its close."""
    return [
        line["closed"] - min(one["sent"] for one in asked if one["round"] == line["round"]) for line in told
    ]


def _phases(memory: Memory, *, every_s: float = 2.0) -> list[dict[str, Any]]:
    """The largest sum within each stretch of time, by process: a picture of the run in a few lines."""
    stretches: dict[int, tuple[float, dict[str, int]]] = {}
    start = memory.samples[0][0] if memory.samples else 0.0
    for at, sample in memory.samples:
        stretch = math.floor((at - start) / every_s)
        if stretch not in stretches or sum(sample.values()) > sum(stretches[stretch][1].values()):
            stretches[stretch] = (at - start, sample)
    return [{"second": round(at, 2), **sample} for at, sample in stretches.values()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Memory of the server's processes.")
    parser.add_argument("--hospitals", type=int, default=20)
    parser.add_argument("--parameters", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bits", type=int, choices=(8, 4, 32), default=8)
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--folder", type=Path, help="where there is room on the disk")
    print(json.dumps(measure_server_memory(**vars(parser.parse_args(arguments)))))


if __name__ == "__main__":
    main()
