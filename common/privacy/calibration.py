"""How much noise, or how many steps, a budget takes: the accountant's inverse.

solve_noise_multiplier(histories=[], sampling_rate=0.5, steps=20, epsilon=3, delta=1e-3)    # 2.477

Found by Newton's steps on coarse grids in a tenth of a second; the claim itself has the last word.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import BudgetError
from common.privacy.accountant import NEAR, RUNNING_GRID, fits, merge, running_epsilon
from common.privacy.accountant import epsilon as claimed_epsilon
from common.privacy.loss_grids import cost_at, expected_cost, is_affordable, on_finest_grid
from common.privacy.plan import PrivacyEvent

_PER_UNIT = 1000
"""Noise multipliers are rounded up to thousandths."""
_COARSE_GRID = 1e-2
_USUAL_SLOPES = {"noise": -1.1, "steps": 0.6}
"""Of log epsilon over their logarithm."""
_LONGEST_STEP = math.log(2)
_MOST_TRIES = 30

History = Sequence[PrivacyEvent]


def solve_noise_multiplier(
    *,
    histories: Sequence[History],
    sampling_rate: float,
    steps: int,
    epsilon: float,
    delta: float,
    minimum: float = 0.3,
    maximum: float = 500.0,
) -> float:
    """Smallest noise multiplier, rounded up to 1e-3, with which `steps` more steps fit every history.

    `histories` are what the patients have behind them; none means nothing. The result lies in
    [minimum, maximum]. It is proven by `accountant.epsilon` for the history that decides, and by
    `accountant.fits` for the others. Raises BudgetError when even `maximum` costs more.
    """
    past = _worst_first(histories, delta)
    highest = math.floor(maximum * _PER_UNIT + 1e-9)
    found: int | None = math.ceil(minimum * _PER_UNIT - 1e-9)

    def event(thousandths: float) -> PrivacyEvent:
        noise = thousandths / _PER_UNIT
        return PrivacyEvent(sampling_rate=sampling_rate, noise_multiplier=noise, steps=steps)

    for place, (spent, history) in enumerate(past):
        if found is None or found > highest or spent > epsilon * NEAR:
            found = None
            break
        if place and fits([*history, event(found)], epsilon=epsilon, delta=delta):
            continue
        left = _left(spent, epsilon=epsilon, delta=delta)
        budget = _Budget(history=history, event=event, epsilon=epsilon, delta=delta)
        found = budget.first(
            lambda over: over <= 0,
            start=_PER_UNIT * _noise_about(left, sampling_rate=sampling_rate, steps=steps),
            slope=_USUAL_SLOPES["noise"],
            lowest=found,
            highest=highest,
        )
    if found is None:
        raise BudgetError(
            f"{steps} steps at sampling rate {sampling_rate:g} do not fit a budget of epsilon {epsilon:g}",
            why=f"epsilon {claimed_epsilon(past[0][1], delta=delta):.4g} is spent, and even noise multiplier "
            f"{maximum:g} would cost too much",
            fix="train fewer rounds or steps, lower the sampling rate, or raise the budget",
        )
    return found / _PER_UNIT


def affordable_steps(
    *,
    histories: Sequence[History],
    sampling_rate: float,
    noise_multiplier: float,
    epsilon: float,
    delta: float,
    most: int = 1_000_000,
) -> int:
    """How many more steps fit every history within `epsilon`: 0 when none does, at most `most`."""
    found = most if noise_multiplier > 0 else 0

    def event(steps: float) -> PrivacyEvent:
        number = max(1, round(steps))
        return PrivacyEvent(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=number)

    for place, (spent, history) in enumerate(_worst_first(histories, delta)):
        if found < 1 or spent > epsilon * NEAR:
            return 0
        if place and fits([*history, event(found)], epsilon=epsilon, delta=delta):
            continue
        left = _left(spent, epsilon=epsilon, delta=delta)
        budget = _Budget(history=history, event=event, epsilon=epsilon, delta=delta)
        too_many = budget.first(
            lambda over: over > 0,
            start=_steps_about(left, sampling_rate=sampling_rate, noise_multiplier=noise_multiplier),
            slope=_USUAL_SLOPES["steps"],
            lowest=1,
            highest=found,
        )
        found = found if too_many is None else too_many - 1
    return max(found, 0)


@dataclass(frozen=True, kw_only=True)
class _Budget:
    """What is left behind one history for one event of a number: of noise in thousandths, or of steps."""

    history: History
    event: Callable[[float], PrivacyEvent]
    epsilon: float
    delta: float

    def first(
        self, holds: Callable[[float], bool], *, start: float, slope: float, lowest: int, highest: int
    ) -> int | None:
        """First whole number in [lowest, highest] from which on the logarithm of cost over budget `holds`.

        None where it holds nowhere. `slope` is about that of this logarithm over the number's.
        """
        grid = RUNNING_GRID
        while not is_affordable(grid, epsilon=4 * self.epsilon):
            grid = round(grid * 10, 10)

        def coarse(number: float) -> float:
            kinds = merge([*self.history, self.event(number)])
            return self._over(on_finest_grid(kinds, self.delta, max(grid, _COARSE_GRID), cost_at))

        def foretold(number: float) -> float:
            kinds = merge([*self.history, self.event(number)])
            return self._over(expected_cost(kinds, self.delta, grid))

        def claimed(number: float) -> float:
            events = [*self.history, self.event(number)]
            bound = running_epsilon(events, delta=self.delta)
            is_plain = not self.epsilon / NEAR < bound <= self.epsilon * NEAR
            return self._over(bound if is_plain else claimed_epsilon(events, delta=self.delta))

        near, slope = _root(coarse, start, slope, lowest, highest, enough=0.02)
        near, slope = _root(foretold, near, slope, lowest, highest, enough=min(0.02, 3 / near))
        return _first_whole(claimed, holds, near, slope, lowest, highest)

    def _over(self, cost: float) -> float:
        return math.log(cost / self.epsilon) if cost > 0 else -math.inf


def _root(
    over: Callable[[float], float], number: float, slope: float, lowest: int, highest: int, *, enough: float
) -> tuple[float, float]:
    """Where `over` is zero (else the bound next to it), and its slope there, by secants in logarithms.

    It ends with the first step that is not longer than `enough`.
    """
    number = min(max(number, lowest), highest)
    rises, before = slope > 0, None
    left, right = 0.0, math.inf
    for _ in range(_MOST_TRIES):
        value = over(number)
        if before is not None and before[0] != number and math.isfinite(value - before[1]):
            secant = (value - before[1]) / math.log(number / before[0])
            slope = secant if (secant > 0) == rises and abs(secant) > 1e-3 else slope
        before = (number, value)
        left, right = (left, number) if (value > 0) == rises else (number, right)
        step = min(max(-value / slope, -_LONGEST_STEP), _LONGEST_STEP)
        proposed = min(max(number * math.exp(step), lowest), highest)
        if abs(math.log(proposed / number)) <= enough:
            return proposed, slope
        number = proposed if left < proposed < right else math.sqrt(left * right)
    return number, slope


def _first_whole(
    over: Callable[[float], float],
    holds: Callable[[float], bool],
    number: float,
    slope: float,
    lowest: int,
    highest: int,
) -> int | None:
    """First whole number in [lowest, highest] at which `over` holds; None for none.

    The one before it is not asked where the slope says plainly that it does not hold there.
    """
    before, found = lowest - 1, highest + 1
    tried = math.ceil(number - 1e-3)
    for turn in range(_MOST_TRIES):
        tried = min(max(tried, before + 1), found - 1)
        value = over(tried)
        if holds(value):
            found = tried
        else:
            before = tried
        back = slope * math.log(tried / max(tried - 1, 0.5))
        plainly = all(not holds(value - share * back) for share in (0.85, 1.0))
        if found - before == 1 or (found == tried and plainly):
            break
        if turn < 4 or found > highest:
            tried = math.ceil(tried * math.exp(min(max(-value / slope, -1), 1)) - 1e-3)
        else:  # the slope misleads
            tried = (before + found) // 2
    return found if found <= highest else None


def _worst_first(histories: Sequence[History], delta: float) -> list[tuple[float, History]]:
    """What each history has cost, and the history."""
    spent = [(running_epsilon(history, delta=delta), history) for history in histories or [()]]
    return sorted(spent, key=lambda each: each[0], reverse=True)


def _left(spent: float, *, epsilon: float, delta: float) -> float:
    """About what is left of a budget, as the mean of a Gaussian of variance 1: squares of these add up."""
    whole = _gaussian_mean(epsilon, delta)
    return math.sqrt(max(whole**2 - _gaussian_mean(spent, delta) ** 2, 0.01 * whole**2))


def _noise_about(left: float, *, sampling_rate: float, steps: int) -> float:
    """About the noise multiplier wanted, by the central limit theorem (Dong et al., arXiv 1905.02383)."""
    if sampling_rate == 1:
        return math.sqrt(steps) / left
    return 1 / math.sqrt(math.log1p((left / sampling_rate) ** 2 / steps))


def _steps_about(left: float, *, sampling_rate: float, noise_multiplier: float) -> float:
    """About the steps affordable, by the same theorem."""
    if sampling_rate == 1:
        return (left * noise_multiplier) ** 2
    return (left / sampling_rate) ** 2 / math.expm1(min(noise_multiplier**-2, 700))


def _gaussian_mean(epsilon: float, delta: float) -> float:
    """How far apart two Gaussians of variance 1 are that cost epsilon (Balle & Wang 2018, Theorem 8)."""
    if not 0 < epsilon < math.inf:
        return epsilon

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    low, high = 1e-9, 2 * math.sqrt(2 * epsilon) + 100.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        off = normal(-middle / 2 - epsilon / middle)
        cost = normal(middle / 2 - epsilon / middle) - (math.exp(min(epsilon, 700)) * off if off else 0)
        low, high = (middle, high) if cost < delta else (low, middle)
    return low
