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
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from common.errors import BudgetError
from common.privacy.plan import PrivacyEvent

Kinds = tuple[tuple[float, float, int], ...]
"""Merged events: sorted (sampling_rate, noise_multiplier, steps), each (q, sigma) once."""

CLAIM_GRID = 1e-4
"""Width of the bins of the privacy loss, dp-accounting's default."""
RUNNING_GRID = 1e-3
_COARSEST_GRID = 1e-1
_MOST_BINS = 1e6
_STEPS_PER_EPSILON = 700
_SMALL_EPSILON = 0.2
_NEAR = 1.01
"""`running_epsilon` is never above `epsilon` by this factor."""
_NOISE_STEPS_PER_UNIT = 1000
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
    if bound <= epsilon or bound > epsilon * _NEAR:
        return bound <= epsilon
    return _claim(merge(events), delta) <= epsilon


def solve_noise_multiplier(
    *,
    histories: Sequence[Sequence[PrivacyEvent]],
    sampling_rate: float,
    steps: int,
    epsilon: float,
    delta: float,
    minimum: float = 0.3,
    maximum: float = 500.0,
) -> float:
    """Smallest noise multiplier, rounded up to 1e-3, with which `steps` more steps fit every history.

    `histories` are what the patients have behind them; none means nothing. The result lies in
    [minimum, maximum] and is checked by `epsilon` itself. Raises BudgetError when even `maximum` costs more.
    """
    past = sorted(histories or [()], key=lambda history: running_epsilon(history, delta=delta), reverse=True)

    def together(history: Sequence[PrivacyEvent], thousandths: int) -> list[PrivacyEvent]:
        noise = thousandths / _NOISE_STEPS_PER_UNIT
        return [*history, PrivacyEvent(sampling_rate=sampling_rate, noise_multiplier=noise, steps=steps)]

    def surely(history: Sequence[PrivacyEvent], thousandths: int) -> bool:
        return running_epsilon(together(history, thousandths), delta=delta) <= epsilon

    def exactly(history: Sequence[PrivacyEvent], thousandths: int) -> bool:
        return fits(together(history, thousandths), epsilon=epsilon, delta=delta)

    found = math.ceil(minimum * _NOISE_STEPS_PER_UNIT - 1e-9)
    highest = math.floor(maximum * _NOISE_STEPS_PER_UNIT + 1e-9)
    if found > highest or not all(exactly(history, highest) for history in past):
        raise BudgetError(
            f"{steps} steps at sampling rate {sampling_rate:g} do not fit a budget of epsilon {epsilon:g}",
            why=f"epsilon {_claim(merge(past[0]), delta):.4g} is spent, and even noise multiplier "
            f"{maximum:g} would cost too much",
            fix="train fewer rounds or steps, lower the sampling rate, or raise the budget",
        )
    # From the top: little noise on a wild number of steps is never computed, it would fill the memory.
    for history in past:
        found = _least(partial(surely, history), partial(exactly, history), found - 1, highest)
    # The claim itself has the last word.
    while max(_claim(merge(together(history, found)), delta) for history in past) > epsilon:
        found += 1
    return found / _NOISE_STEPS_PER_UNIT


def affordable_steps(
    *,
    histories: Sequence[Sequence[PrivacyEvent]],
    sampling_rate: float,
    noise_multiplier: float,
    epsilon: float,
    delta: float,
    most: int = 1_000_000,
) -> int:
    """How many more steps fit every history within `epsilon`: 0 when none does, at most `most`."""
    past = histories or [()]

    def too_many(steps: int) -> bool:
        run = PrivacyEvent(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)
        return not all(fits([*history, run], epsilon=epsilon, delta=delta) for history in past)

    if noise_multiplier == 0 or too_many(1):
        return 0
    fit, tried = 1, 2
    while tried < most and not too_many(tried):
        fit, tried = tried, tried * 2
    if tried >= most:
        if not too_many(most):
            return most
        tried = most
    return _smallest(too_many, fit, tried) - 1


def _least(surely: Callable[[int], bool], exactly: Callable[[int], bool], low: int, high: int) -> int:
    """Smallest number in (low, high] that holds `exactly`; `surely` is cheap and holds a little later."""
    if not surely(high):
        return _smallest(exactly, low, high)
    tried = max(low, high // 2)
    while tried > low and surely(tried):
        high, tried = tried, max(low, tried // 2)
    known = _smallest(surely, tried, high)
    stride = 1
    while known - stride > low and exactly(known - stride):
        known, stride = known - stride, stride * 2
    return _smallest(exactly, max(low, known - stride), known)


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Smallest number in (low, high] from which on `holds`; it holds at `high` and is not asked at `low`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


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
    return _on_finest_grid(kinds, delta, CLAIM_GRID, _accountant_epsilon)


def recomputed_epsilon(events: Sequence[PrivacyEvent], *, delta: float, grid: float = CLAIM_GRID) -> float:
    """`epsilon` on a grid of choice, from the events alone: nothing cached, for verification."""
    kinds = merge(events)
    if _is_trivial(kinds):
        return _trivial_cost(kinds, delta)
    return _on_finest_grid(kinds, delta, grid, _accountant_epsilon)


@functools.lru_cache(maxsize=4096)
def _running(kinds: Kinds, delta: float) -> float:
    _check_delta(delta)
    bound = _on_finest_grid(kinds, delta, RUNNING_GRID, _cached_epsilon)
    # The coarse grid's error grows with the steps and matters most for small costs.
    total = sum(steps for _, _, steps in kinds)
    coarse_is_close = bound >= _SMALL_EPSILON and total <= _STEPS_PER_EPSILON * bound
    return bound if coarse_is_close else min(bound, _claimed(kinds, delta))


def _on_finest_grid(kinds: Kinds, delta: float, finest: float, cost: Any) -> float:
    """Refine the grid by tens, up to `finest` or a million bins: no server's wild plan fills the memory."""
    grid = _COARSEST_GRID
    bound = float(cost(kinds, delta, grid))
    while grid > finest * 1.5 and bound / (grid / 10) <= _MOST_BINS:
        grid = round(grid / 10, 10)
        bound = float(cost(kinds, delta, grid))
    return bound


def _accountant_epsilon(kinds: Kinds, delta: float, grid: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, grid)
    for sampling_rate, noise_multiplier, steps in kinds:
        step = dp_accounting.GaussianDpEvent(noise_multiplier)
        if sampling_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(sampling_rate, step)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


def _cached_epsilon(kinds: Kinds, delta: float, grid: float) -> float:
    losses = [_composed_loss(*kind, grid) for kind in kinds]
    return float(functools.reduce(lambda a, b: a.compose(b), losses).get_epsilon_for_delta(delta))


def _composed_loss(sampling_rate: float, noise_multiplier: float, steps: int, grid: float) -> Any:
    if sampling_rate == 1:
        return _step_loss(1.0, noise_multiplier / math.sqrt(steps), grid)
    return _step_loss(sampling_rate, noise_multiplier, grid).self_compose(steps)


@functools.lru_cache(maxsize=64)
def _step_loss(sampling_rate: float, noise_multiplier: float, grid: float) -> Any:
    """Privacy loss distribution of one step; kept, since the next round asks for it again."""
    import dp_accounting
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        value_discretization_interval=grid,
        sampling_prob=sampling_rate,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
