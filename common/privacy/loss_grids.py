"""Privacy loss distributions (PLD) on grids: what events cost, by dp-accounting, finer and finer.

Every grid's cost is proven: masses are moved to its points so that the cost can only rise ("connect the
dots", Doroshenko et al., arXiv 2207.04380).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

Kind = tuple[float, float, int]
"""Sampling rate, noise multiplier (not 0) and number of equal steps."""

Cost = Callable[[tuple[Kind, ...], float, float], float]
"""Epsilon of kinds at delta on a grid."""

_COARSEST_GRID = 1e-1
_MOST_BINS = 1e6


def on_finest_grid(kinds: tuple[Kind, ...], delta: float, finest: float, cost: Cost) -> float:
    """Refine the grid by tens, up to `finest` or a million bins: no server's wild plan fills the memory."""
    grid = _COARSEST_GRID
    bound = cost(kinds, delta, grid)
    while grid > finest * 1.5 and is_affordable(grid / 10, epsilon=bound):
        grid = round(grid / 10, 10)
        bound = cost(kinds, delta, grid)
    return bound


def is_affordable(grid: float, *, epsilon: float) -> bool:
    """Whether costs of about `epsilon` can be computed on `grid`."""
    return epsilon / grid <= _MOST_BINS


def expected_cost(kinds: tuple[Kind, ...], delta: float, grid: float) -> float:
    """What the grid ten times finer will say, foretold from `grid` and the one ten times coarser: no bound.

    The error of a grid goes with its square.
    """
    fine, coarse = cost_at(kinds, delta, grid), cost_at(kinds, delta, round(grid * 10, 10))
    return fine - (coarse - fine) / 100 if coarse < 1.5 * fine else fine


@functools.lru_cache(maxsize=8192)
def cost_at(kinds: tuple[Kind, ...], delta: float, grid: float) -> float:
    """Proven epsilon on `grid`; parts that come again are kept."""
    losses = [_composed(*kind, grid) for kind in kinds]
    return float(functools.reduce(lambda a, b: a.compose(b), losses).get_epsilon_for_delta(delta))


def uncached_cost_at(kinds: tuple[Kind, ...], delta: float, grid: float) -> float:
    """The same by dp-accounting's own accountant and from the events alone."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, grid)
    for sampling_rate, noise_multiplier, steps in kinds:
        step = dp_accounting.GaussianDpEvent(noise_multiplier)
        if sampling_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(sampling_rate, step)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=16)
def _composed(sampling_rate: float, noise_multiplier: float, steps: int, grid: float) -> Any:
    if sampling_rate == 1:
        return _step(1.0, noise_multiplier / math.sqrt(steps), grid)
    return _step(sampling_rate, noise_multiplier, grid).self_compose(steps)


@functools.lru_cache(maxsize=64)
def _step(sampling_rate: float, noise_multiplier: float, grid: float) -> Any:
    """Privacy loss distribution of one step; kept, since the next round asks for it again."""
    import dp_accounting
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        value_discretization_interval=grid,
        sampling_prob=sampling_rate,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
