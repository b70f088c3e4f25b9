"""Time several ways to do one thing side by side, so that whatever disturbs the machine disturbs all of them.

seconds = interleave({"ours": f, "theirs": g}, repeats=30)
statistics.median(seconds["theirs"]) / statistics.median(seconds["ours"])
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Clock = Callable[[], float]


def interleave(
    ways: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warm_up: int = 2,
    at_least: int = 5,
    budget_s: float = 60.0,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call by way, the ways taken in turn; each turn starts with another one.

    After `warm_up` turns that do not count: `repeats` turns, or fewer (never below `at_least`) once
    `budget_s` seconds have passed. All ways have equally many calls.
    """
    if not ways or repeats < 1 or warm_up < 0:
        raise ValueError(f"nothing to measure: {len(ways)} ways, {repeats} repeats, {warm_up} before")
    names = list(ways)
    for _ in range(warm_up):
        for name in names:
            ways[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    began = clock()
    for turn in range(repeats):
        if turn >= at_least and clock() - began > budget_s:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            ways[name]()
            seconds[name].append(clock() - start)
    return seconds


def spread(seconds: Sequence[float]) -> float:
    """Upper over lower quartile; far above 1 where something else used the machine meanwhile."""
    lower, _, upper = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [*seconds, 0, *seconds]
    return upper / lower
