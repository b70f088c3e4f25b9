"""Measure what privacy and federation cost on this machine.

content = bench(BenchSettings(), say=print)
content["dp_step"][0]["ratio_to_sgd"]
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from simulations.benchmarks.cases import StepCase, parse_cases
from simulations.benchmarks.machine import describe_machine, usable_cores

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to measure and how long."""

    cases: tuple[StepCase, ...] = field(default_factory=lambda: parse_cases("default"))
    threads: int = field(default_factory=usable_cores)
    """Threads of torch, the same for every way."""
    repeats: int = 25
    """Measured calls of each way."""
    case_budget_s: float = 25.0
    """After these seconds a case ends with fewer calls, at least five."""
    updates: int = 20
    """Hospitals' updates that the server reduces."""
    update_parameters: int = 1_000_000
    engine_hospitals: int = 3
    engine_rounds: int = 4


def bench(settings: BenchSettings, *, say: Say = lambda line: None) -> dict[str, Any]:
    """Measure everything; the content of `flower-simulate bench --format json` (DESIGN 6)."""
    from simulations.benchmarks.federation import measure_engine, measure_server, measure_wire
    from simulations.benchmarks.noise import measure_noise, share_of_step

    machine = describe_machine(threads=settings.threads)
    with _threads(settings.threads):
        steps = [_step(case, settings, say) for case in settings.cases]
        say("noise on the grid")
        noise = measure_noise(budget_s=settings.case_budget_s)
        for case, step in zip(settings.cases, steps, strict=True):
            step["noise_share"] = share_of_step(
                case, nanoseconds=noise["nanoseconds"]["grid"], seconds_dp=step["seconds_dp"]
            )
        say("bytes of an update")
        wire = measure_wire()
        say(f"the server: {settings.updates} updates of {settings.update_parameters:,} parameters")
        server = measure_server(updates=settings.updates, parameters=settings.update_parameters)
    say(f"the embedded engine: {settings.engine_hospitals} hospitals, {settings.engine_rounds} rounds")
    engine = measure_engine(hospitals=settings.engine_hospitals, rounds=settings.engine_rounds)
    return {
        "dp_step": steps,
        "noise": noise,
        "wire": wire,
        "server": server,
        "engine": engine,
        "machine": machine,
    }


def _step(case: StepCase, settings: BenchSettings, say: Say) -> dict[str, Any]:
    from simulations.benchmarks.dp_step import measure_step
    from simulations.benchmarks.memory import measure_memory

    say(f"a step of {case.name}, {settings.threads} threads")
    measured = measure_step(case, repeats=settings.repeats, budget_s=settings.case_budget_s)
    return measured | measure_memory(case, threads=settings.threads)


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


BUSY_SPREAD = 1.5
"""Quartiles of equal calls further apart than this are no measurement."""
STEP_COLUMNS = ("step", "SGD", "DP", "ratio", "hooks / DP", "ghost / DP", "memory")


def step_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """The steps as cells under STEP_COLUMNS."""
    return [
        [
            step["case"],
            _milliseconds(step["seconds_sgd"]),
            _milliseconds(step["seconds_dp"]),
            f"{step['ratio_to_sgd']:.2f}",
            f"{step['speedup_over_hooks']:.2f} x",
            f"{step['speedup_over_ghost']:.2f} x",
            "unknown" if step["memory_ratio"] is None else f"{step['memory_ratio']:.2f}",
        ]
        for step in content["dp_step"]
    ]


def other_lines(content: Mapping[str, Any]) -> list[str]:
    """Everything but the steps, for a person."""
    server, engine, machine = content["server"], content["engine"], content["machine"]
    busy = [step["case"] for step in content["dp_step"] if step["spread"] > BUSY_SPREAD]
    return [
        *(
            [f"caution   something else used the machine during {', '.join(busy)}: measure again"]
            if busy
            else []
        ),
        _noise_line(content),
        *(
            f"update    {name}: {size['bytes_message']:,} bytes, "
            f"{size['ratio_to_float32']:.3f} of float32 ({size['parameters']:,} parameters)"
            for name, size in content["wire"].items()
        ),
        f"server    {server['updates']} updates of {server['parameters']:,} parameters: spooled in "
        f"{_milliseconds(server['seconds_spool'])}, reduced in {_milliseconds(server['seconds_reduce'])} "
        f"({server['throughput_ratio']:.2f} of numpy's a += w * b)",
        f"engine    {engine['hospitals']} hospitals, {engine['rounds']} rounds: first training step after "
        f"{engine['seconds_to_first_training_step']:.1f} s, {engine['overhead_s_per_round']:.2f} s overhead "
        f"a round, result after {engine['seconds_command_to_result']:.1f} s",
        f"machine   {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {machine['torch']}, opacus {machine['opacus']}, {machine['date']}",
    ]


def _noise_line(content: Mapping[str, Any]) -> str:
    noise = content["noise"]
    shares = ", ".join(f"{100 * step['noise_share']:.1f} % of {step['case']}" for step in content["dp_step"])
    each = noise["nanoseconds"]
    return (
        f"noise     {each['grid']:.1f} ns a parameter on the grid (torch {each['torch']:.1f}, four draws "
        f"{each['torch-four']:.1f}, cipher alone {each['cipher']:.1f}): {shares}; "
        f"{noise['seconds_large_model']:.2f} s for 25 million"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
