"""What events cost: (epsilon, delta) for adding or removing one unit.

`epsilon` is the number that is claimed: dp-accounting's privacy loss distributions (PLD), pessimistic, at the
library's own grid. `running_epsilon` bounds it from above in a tenth of the time, for every round.
`epsilon_prv` and `epsilon_rdp` are Opacus' and exist so that a claim does not rest on one implementation.
Composition is adaptive: what a hospital sends in one round may depend on all earlier rounds.

No event costs 0; an event without noise costs infinity; order does not matter.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Sequence

from common.privacy.loss_grids import cost_at, on_finest_grid, uncached_cost_at
from common.privacy.plan import PrivacyEvent

Kinds = tuple[tuple[float, float, int], ...]
"""Merged events: sorted (sampling_rate, noise_multiplier, steps), each (q, sigma) once."""

CLAIM_GRID = 1e-4
"""Width of the bins of the privacy loss, dp-accounting's default."""
RUNNING_GRID = 1e-3
_STEPS_PER_EPSILON = 700
_SMALL_EPSILON = 0.2
NEAR = 1.01
"""`running_epsilon` is never above `epsilon` by this factor."""
_RDP_ORDERS = [
    *(1 + x / 100 for x in range(1, 10)),
    *(1 + x / 10 for x in range(1, 100)),
    *range(12, 257),
    *(320, 384, 448, 512, 640, 768, 896, 1024),
]


def merge(events: Iterable[PrivacyEvent]) -> Kinds:
    """Add up the steps of equal (sampling rate, noise multiplier); zero steps vanish."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        kind = (float(event.sampling_rate), float(event.noise_multiplier))
        steps[kind] = steps.get(kind, 0) + int(event.steps)
    return tuple(sorted((q, sigma, count) for (q, sigma), count in steps.items() if count > 0))


def epsilon(events: Sequence[PrivacyEvent], *, delta: float) -> float:
    """Smallest proven epsilon of `events` at `delta`, by PLD; 0.0 for no event, inf without noise.

    Example: q 0.04, sigma 1.5, 2249 steps, delta 1e-5 cost 6.77 (Opacus PRV: 6.777 with its error of 0.01).
    Beyond epsilon 100, where a claim means nothing any more, the grid is coarser (still an upper bound).
    """
    kinds = merge(events)
    return _trivial_cost(kinds, delta) if _is_trivial(kinds) else _claimed(kinds, float(delta))


def running_epsilon(events: Sequence[PrivacyEvent], *, delta: float) -> float:
    """Upper bound on `epsilon`, at most 0.5 % above it (1e-5 where steps are few), some ten times faster."""
    kinds = merge(events)
    return _trivial_cost(kinds, delta) if _is_trivial(kinds) else _running(kinds, float(delta))


def epsilon_prv(events: Sequence[PrivacyEvent], *, delta: float) -> float:
    """Opacus' PRV accountant: an upper bound within about 0.02 of `epsilon` (Gopi et al., arXiv 2106.02848).

    Time and memory grow with epsilon: not for costs above some 50.
    """
    kinds = merge(events)
    if _is_trivial(kinds):
        return _trivial_cost(kinds, delta)
    import numpy as np
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, q, steps) for q, sigma, steps in kinds]
    # Opacus takes log(1 - q) at q = 1 and sizes its domain with a short list of RDP orders: both harmless.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def epsilon_rdp(events: Sequence[PrivacyEvent], *, delta: float) -> float:
    """Opacus' RDP analysis over dense orders: looser than PLD, independent of it (arXiv 1905.09982)."""
    kinds = merge(events)
    if _is_trivial(kinds):
        return _trivial_cost(kinds, delta)
    from opacus.accountants.analysis import rdp

    cost = sum(rdp.compute_rdp(q=q, noise_multiplier=s, steps=n, orders=_RDP_ORDERS) for q, s, n in kinds)
    with warnings.catch_warnings():
        # At the edge of the orders the bound stays valid, only looser.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        bound, _ = rdp.get_privacy_spent(orders=_RDP_ORDERS, rdp=cost, delta=delta)
    return max(0.0, float(bound))


def fits(events: Sequence[PrivacyEvent], *, epsilon: float, delta: float) -> bool:
    """Whether `events` cost at most `epsilon`; the claim's own grid is asked only close to the boundary."""
    bound = running_epsilon(events, delta=delta)
    if bound <= epsilon or bound > epsilon * NEAR:
        return bound <= epsilon
    return _claim(merge(events), delta) <= epsilon


def _claim(kinds: Kinds, delta: float) -> float:
    return _trivial_cost(kinds, delta) if _is_trivial(kinds) else _claimed(kinds, float(delta))


def _is_trivial(kinds: Kinds) -> bool:
    return not kinds or any(sigma == 0 for _, sigma, _ in kinds)


def _trivial_cost(kinds: Kinds, delta: float) -> float:
    _check_delta(delta)
    return math.inf if kinds else 0.0


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, got {delta}")


@functools.lru_cache(maxsize=4096)
def _claimed(kinds: Kinds, delta: float) -> float:
    _check_delta(delta)
    return on_finest_grid(kinds, delta, CLAIM_GRID, _cost_of_claim)


def recomputed_epsilon(events: Sequence[PrivacyEvent], *, delta: float, grid: float = CLAIM_GRID) -> float:
    """`epsilon` on a grid of choice, from the events alone: nothing cached, for verification."""
    kinds = merge(events)
    if _is_trivial(kinds):
        return _trivial_cost(kinds, delta)
    return on_finest_grid(kinds, delta, grid, uncached_cost_at)


def _cost_of_claim(kinds: Kinds, delta: float, grid: float) -> float:
    """The claim's own grid from the events alone; coarser ones, which lead to it, from what is kept."""
    return (cost_at if grid > CLAIM_GRID * 1.5 else uncached_cost_at)(kinds, delta, grid)


@functools.lru_cache(maxsize=4096)
def _running(kinds: Kinds, delta: float) -> float:
    _check_delta(delta)
    bound = on_finest_grid(kinds, delta, RUNNING_GRID, cost_at)
    # The coarse grid's error grows with the steps and matters most for small costs.
    total = sum(steps for _, _, steps in kinds)
    coarse_is_close = bound >= _SMALL_EPSILON and total <= _STEPS_PER_EPSILON * bound
    return bound if coarse_is_close else min(bound, _claimed(kinds, delta))
