"""One step of private training against the same step without privacy, and against Opacus' own modes.

The twin without privacy is the fastest of several: two memory layouts, eager and, where asked for, compiled.
A case and its ragged form are measured in one run, because all but ours do the same in both.
"""

import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simulations.benchmarks.cases import StepCase
from simulations.benchmarks.compiled import why_not_compiled
from simulations.benchmarks.interleaving import interleave, spread
from simulations.benchmarks.memory import free_bytes, rises_of_peak
from simulations.benchmarks.training_steps import (
    COMPILED_TWINS,
    DP,
    DP_RAGGED,
    EAGER_TWINS,
    GHOST,
    HOOKS,
    SGD_IN_CHUNKS,
    TWINS,
    Way,
    ways_of,
)

_LONGEST_CALL_S = 30.0
"""An alternative that takes longer is left out."""
_COPIES_OF_GRADIENTS = 2.5
"""Per-row gradients that Opacus holds at once, for the guess whether they fit."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How steps are measured."""

    repeats: int = 25
    """Measured calls of each way."""
    budget_s: float = 25.0
    """After these seconds a case ends with fewer calls, at least five."""
    threads: int = 1
    """Threads of torch, the same for every way; set by the caller."""
    compiled: bool = False
    """Whether twins are compiled too."""


def measure_steps(cases: Sequence[StepCase], settings: StepSettings) -> list[dict[str, Any]]:
    """Median seconds of a step by every way, ratios and memory; `raw` has the seconds of every call.

    cases: one case, its ragged form, or both; their answers, in the same order, share the alternatives.
    """
    even = cases[0].even
    if any(case.even != even for case in cases):
        raise ValueError("only a case and its ragged form are measured in one run")
    ours = [_name_of(case) for case in cases]
    others, reasons = _candidates(even, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Opacus about its own hooks
        with ways_of(even, [*ours, *others]) as ways:
            usable = _tried(ways, optional=(HOOKS, GHOST, *COMPILED_TWINS), reasons=reasons)
            steps = {name: way.step for name, way in usable.items()}
            seconds = interleave(steps, repeats=settings.repeats, warm_up=1, budget_s=settings.budget_s)
            rows = {name: way.rows_computed for name, way in usable.items()}
    twins = [name for name in TWINS if name in seconds]
    eager = min(EAGER_TWINS, key=lambda way: statistics.median(seconds[way]))
    memory = rises_of_peak(even, [eager, *ours], threads=settings.threads)
    return [
        _answer(case, seconds, rows[name], twins=twins, reasons=reasons)
        | _memory_of(memory, ours=name, twin=eager)
        for case, name in zip(cases, ours, strict=True)
    ]


def _name_of(case: StepCase) -> str:
    return DP_RAGGED if case.ragged else DP


def _candidates(case: StepCase, settings: StepSettings) -> tuple[list[str], dict[str, str]]:
    """The ways to try beside ours, and why others are not tried."""
    names, reasons = [*EAGER_TWINS, SGD_IN_CHUNKS], {}
    needed, free = _COPIES_OF_GRADIENTS * 4 * case.batch_size * case.num_parameters, free_bytes()
    for name in (HOOKS, GHOST):
        if free is not None and needed > free:
            reasons[name] = f"needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        else:
            names.append(name)
    if settings.compiled:
        found = why_not_compiled(case, threads=settings.threads)
        names += [name for name in COMPILED_TWINS if found[name] is None]
        reasons |= {name: reason for name, reason in found.items() if reason is not None}
    return names, reasons


def _tried(ways: Mapping[str, Way], *, optional: Sequence[str], reasons: dict[str, str]) -> dict[str, Way]:
    """Call each once; an optional one that cannot, or takes too long, is left out with its reason."""
    usable = {}
    for name, way in ways.items():
        began = time.perf_counter()
        try:
            way.step()
        except (RuntimeError, MemoryError, NotImplementedError) as error:
            if name not in optional:
                raise
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        taken = time.perf_counter() - began
        if name in optional and name not in COMPILED_TWINS and taken > _LONGEST_CALL_S:
            reasons[name] = f"a step took {taken:.0f} s"
            continue
        usable[name] = way
    return usable


def _answer(
    case: StepCase,
    seconds: Mapping[str, Sequence[float]],
    rows_computed: int,
    *,
    twins: Sequence[str],
    reasons: Mapping[str, str],
) -> dict[str, Any]:
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    ours, twin = _name_of(case), min(twins, key=lambda way: medians[way])
    own = medians[ours]
    by_turn = [mine / other for mine, other in zip(seconds[ours], seconds[twin], strict=True)]
    left_out = {DP, DP_RAGGED} - {ours}
    return {
        "case": case.name,
        "seconds_sgd": medians[twin],
        "seconds_dp": own,
        "ratio_to_sgd": own / medians[twin],
        "ratio_quartiles": _quartiles(by_turn),
        "speedup_over_hooks": medians[HOOKS] / own if HOOKS in medians else None,
        "speedup_over_ghost": medians[GHOST] / own if GHOST in medians else None,
        "seconds_hooks": medians.get(HOOKS),
        "seconds_ghost": medians.get(GHOST),
        "ratio_to_sgd_in_chunks": own / medians[SGD_IN_CHUNKS],
        "twin": twin,
        "not_measured": dict(reasons),
        "rows": case.batch_size,
        "rows_computed": rows_computed,
        "repeats": len(seconds[ours]),
        "spread": max(spread(values) for way, values in seconds.items() if way not in left_out),
        "raw": {"seconds": {way: list(values) for way, values in seconds.items() if way not in left_out}},
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4)


def _memory_of(found: Mapping[str, Mapping[str, Any]], *, ours: str, twin: str) -> dict[str, Any]:
    """Bytes by which a step raises the peak, ours and the eager twin's, their ratio; null with a reason."""
    sgd, dp = found[twin].get("bytes"), found[ours].get("bytes")
    ratio = dp / sgd if isinstance(sgd, int) and isinstance(dp, int) and sgd > 0 else None
    result = {"memory_ratio": ratio, "memory_twin": twin, "bytes_sgd": sgd, "bytes_dp": dp}
    if ratio is None:
        reasons = [found[way]["reason"] for way in (twin, ours) if found[way].get("reason")]
        result["memory_reason"] = reasons[0] if reasons else "the twin's step raised no peak"
    return result
