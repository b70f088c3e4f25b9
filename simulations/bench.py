"""Measure what privacy and federation cost on this machine.

content = bench(BenchSettings(), say=print)
content["dp_step"][0]["ratio_to_sgd"]
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ConfigError, FederationError
from simulations.benchmarks.cases import StepCase, parse_cases
from simulations.benchmarks.machine import describe_machine, now, usable_cores

Say = Callable[[str], None]
Content = dict[str, Any]

PARTS = ("dp_step", "wire", "accuracy", "server", "engine", "scale", "startup")
SHORT_PARTS = ("dp_step", "wire", "server", "engine")
"""Those of a run without flags."""
FULL_PROFILES = "cnn:28:128,cnn:150:32,cnn-flatten:28:128,resnet18:64:64"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to measure and how long."""

    parts: tuple[str, ...] = SHORT_PARTS
    """Of PARTS."""
    cases: tuple[StepCase, ...] = field(default_factory=lambda: parse_cases("default"))
    threads: int = field(default_factory=usable_cores)
    """Threads of torch, the same for every way."""
    repeats: int = 25
    """Measured calls of each way."""
    case_budget_s: float = 25.0
    """After these seconds a case ends with fewer calls, at least five."""
    compiled: tuple[str, ...] = ()
    """Models whose twins are compiled too."""
    profiles: tuple[StepCase, ...] = ()
    """Steps that are taken apart by layer."""
    data: Path | None = None
    """Images for `accuracy`; generated ones without."""
    full: bool = False
    """The large measurements of docs/benchmarks.md too; minutes each."""
    updates: int = 20
    """Hospitals' updates that the server reduces."""
    update_parameters: int = 1_000_000
    engine_hospitals: int = 3
    engine_rounds: int = 4


def full_settings(*, threads: int) -> BenchSettings:
    """Everything that docs/benchmarks.md shows."""
    return BenchSettings(
        parts=PARTS,
        cases=parse_cases("all"),
        threads=threads,
        compiled=("cnn",),
        profiles=parse_cases(FULL_PROFILES),
        full=True,
    )


def parse_parts(text: str) -> tuple[str, ...]:
    """Read parts separated by commas, in the order of PARTS. Raises ConfigError for an unknown one."""
    wanted = {part.strip() for part in text.split(",")}
    if unknown := sorted(wanted - set(PARTS)):
        raise ConfigError(
            f"--only {unknown[0]!r} is no part of the benchmark", fix=f"choose from {', '.join(PARTS)}"
        )
    return tuple(part for part in PARTS if part in wanted)


def bench(settings: BenchSettings, *, say: Say = lambda line: None) -> Content:
    """Measure the parts; the content of `flower-simulate bench --format json` (DESIGN 6).

    `parts` tells when each was measured and how long that took; one that fails says so there under `failed`,
    and the others go on.
    """
    measures: dict[str, Callable[[BenchSettings, Say], Content]] = {
        "dp_step": _measure_steps,
        "wire": _measure_wire,
        "accuracy": _measure_accuracy,
        "server": _measure_server,
        "engine": _measure_engine,
        "scale": _measure_scale,
        "startup": _measure_startup,
    }
    content: Content = {"parts": {}, "machine": describe_machine(threads=settings.threads)}
    for part in settings.parts:
        about: Content = {"date": now()}
        content["parts"][part], began = about, time.monotonic()
        try:
            content |= measures[part](settings, say)
        except FederationError as error:
            about["failed"] = " ".join(str(error).split())
            say(f"{part} failed: {about['failed']}")
        about["seconds"] = round(time.monotonic() - began, 1)
    return content


def _measure_steps(settings: BenchSettings, say: Say) -> Content:
    from simulations.benchmarks.dp_step import StepSettings, measure_steps
    from simulations.benchmarks.noise import measure_noise, share_of_step

    steps = []
    with _threads(settings.threads):
        for cases in _together(settings.cases):
            say(f"a step of {' and '.join(case.name for case in cases)}, {settings.threads} threads")
            how = StepSettings(
                repeats=settings.repeats,
                budget_s=settings.case_budget_s,
                threads=settings.threads,
                compiled=cases[0].model in settings.compiled,
            )
            steps += measure_steps(cases, how)
        say("noise on the grid")
        noise = measure_noise(budget_s=settings.case_budget_s)
        for case, step in zip(itertools.chain(*_together(settings.cases)), steps, strict=True):
            step["noise_share"] = share_of_step(
                case, nanoseconds=noise["nanoseconds"]["grid"], seconds_dp=step["seconds_dp"]
            )
        profiles = [_profile(case, steps, say) for case in settings.profiles]
    return {"dp_step": steps, "noise": noise} | ({"profile": profiles} if profiles else {})


def _together(cases: Sequence[StepCase]) -> list[list[StepCase]]:
    """A case and its ragged form are measured in one run."""
    groups: dict[StepCase, list[StepCase]] = {}
    for case in cases:
        groups.setdefault(case.even, []).append(case)
    return list(groups.values())


def _profile(case: StepCase, steps: Sequence[Content], say: Say) -> Content:
    from simulations.benchmarks.layer_profile import profile_step

    say(f"the layers of {case.name}")
    twins = [step["memory_twin"] for step in steps if step["case"] in (case.name, case.even.name)]
    with _threads(1):  # what runs beside each other cannot be told apart
        return profile_step(case, twin=twins[0]) if twins else profile_step(case)


def _measure_wire(settings: BenchSettings, say: Say) -> Content:
    from simulations.benchmarks.federation import WIRE_MODELS, measure_wire

    say("bytes of an update")
    return {"wire": measure_wire((*WIRE_MODELS, "cnn-flatten") if settings.full else WIRE_MODELS)}


def _measure_accuracy(settings: BenchSettings, say: Say) -> Content:
    from simulations.benchmarks.accuracy import measure_accuracy

    seeds = 5 if settings.full else 1
    say(f"test AUC with and without rounding the updates, {2 * seeds} runs")
    return {"accuracy": measure_accuracy(seeds=seeds, data=settings.data)}


def _measure_server(settings: BenchSettings, say: Say) -> Content:
    from simulations.benchmarks.federation import measure_server
    from simulations.benchmarks.server_memory import measure_server_memory

    say(f"the server: {settings.updates} updates of {settings.update_parameters:,} parameters")
    with _threads(settings.threads):
        server = measure_server(updates=settings.updates, parameters=settings.update_parameters)
    if settings.full:
        say("the server's memory: 100 hospitals, 25,000,000 parameters")
        server["memory"] = measure_server_memory(
            hospitals=100, parameters=25_000_000, rounds=1, timeout_s=1500.0
        )
    return {"server": server}


def _measure_engine(settings: BenchSettings, say: Say) -> Content:
    from simulations.benchmarks.engine import measure_against_ray, measure_engine

    say(f"the embedded engine: {settings.engine_hospitals} hospitals, {settings.engine_rounds} rounds")
    engine = measure_engine(
        hospitals=settings.engine_hospitals,
        rounds=settings.engine_rounds,
        repeats=3 if settings.full else 1,
    )
    if settings.full:
        say("the embedded engine beside Ray: 10 hospitals, 5 rounds")
        engine["against_ray"] = measure_against_ray(hospitals=10, rounds=5)
    return {"engine": engine}


def _measure_scale(settings: BenchSettings, say: Say) -> Content:
    from simulations.benchmarks.engine import measure_scale

    sizes = (100, 1000) if settings.full else (20, 100)
    say(f"many hospitals: {sizes[0]:,} and {sizes[1]:,}")
    return {"scale": measure_scale(hospitals=sizes)}


def _measure_startup(settings: BenchSettings, say: Say) -> Content:
    from simulations.benchmarks.startup import measure_startup

    say("start-up: every command's --help, status, images, the solver of noise")
    return {"startup": measure_startup(repeats=3 if settings.full else 1)}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Fix torch's threads, here and in the processes that are started meanwhile."""
    import torch

    before, inherited = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop("OMP_NUM_THREADS")
        if inherited is not None:
            os.environ["OMP_NUM_THREADS"] = inherited
