"""Which grid the server announces for updates: spacings from public numbers, the same for all hospitals.

Under privacy with one local SGD step (`is_noise_known`) the weighted update of a hospital is, beside its
patients' share, noise of standard deviation l sigma C / q for the learning rate l, whatever its size. The
spacing, one for all parameters, is at most FINE of the least noise in the run: rounding then adds less than
4 % to the variance of that noise, and the outsider's epsilon stays proven (`server.outsider`). The noise
multipliers are the stated ones; before the first answer, that of a run of about epsilon 8 (3 for 4 bits). No
such spacing looks at an update.

Everywhere else the spacings follow the updates of the round before, parameter by parameter: twice what all
but one in a thousand of its numbers stay below, in the hospital where that is most. Before the first answer:
learning rate, steps, the largest weight, and a gradient of norm 1.

A spacing that is too fine costs bytes, not truth (`common.quantisation`).
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from common.config import PublicPlan
from common.parameters import Template, num_parameters
from common.quantisation import LARGEST, Grid, bits_of
from common.schedule import learning_rate
from server.spool import SpooledLevels

FINE = 0.4
"""Spacing over standard deviation of a hospital's noise, at most, so that noise of several adds up."""
_NOISE_INSIDE = 4.0
"""Standard deviations of the largest noise that fit into the bits at least."""
_FIRST_EPSILON = {8: 8.0, 4: 3.0}
"""8 bits hold the noise of a smaller epsilon too; 4 bits need the one that is most likely."""
_LOW_GUESS, _LEAST_NOISE = 0.75, 0.3
_HEADROOM = {8: 2.0, 4: 1.0}
_PERMILLE = 0.999
_HEAVY_TAIL = 16.0
"""A gradient of norm 1 over P numbers stays below this over sqrt(P), as a first guess."""
_FINER_WHEN_ZERO = 4
_RANGE_OF_EXPONENTS = 20
"""No parameter's spacing is finer than the coarsest by more than 2 to this."""
_LOWEST, _HIGHEST = -100, 100
_WINDOWS, _WINDOW = 16, 1024
"""So many numbers of a parameter are looked at."""
_HOSPITALS = 32


def grid_of(plan: PublicPlan, exponents: tuple[int, ...]) -> Grid | None:
    """The grid of these spacings; None where there are none and updates travel as float32."""
    return Grid(bits=plan.wire.bits, exponents=exponents) if exponents else None


def is_noise_known(plan: PublicPlan) -> bool:
    """Whether an update is one noisy sum whose noise hospitals state."""
    return plan.claims_privacy and plan.training.optimizer == "sgd" and plan.privacy.local_steps == 1


def noise_in_update(plan: PublicPlan, *, round_number: int) -> float:
    """Standard deviation of the noise in one number of a weighted update, for noise multiplier 1."""
    rate = learning_rate(plan.training, round_number=round_number, num_rounds=plan.federation.rounds)
    return rate * plan.privacy.l2_clip_norm / plan.privacy.sampling_rate


def first_grid(plan: PublicPlan, template: Template, *, largest_weight: int) -> tuple[int, ...]:
    """Exponents of the spacings of round 1, by parameter in name order; none where updates are float32."""
    bits = bits_of(plan.wire.bits, num_parameters(template))
    if bits == 32:
        return ()
    if is_noise_known(plan):
        noise = _expected_noise(plan, largest_weight=largest_weight, epsilon=_FIRST_EPSILON[bits])
        return (_noise_exponent(plan, [noise], bits=bits, round_number=1),) * len(template)
    ranges = [_first_range(plan, size, largest_weight=largest_weight) for size in _sizes(template)]
    return tuple(_exponent(_HEADROOM[bits] * one / LARGEST[bits]) for one in ranges)


def _expected_noise(plan: PublicPlan, *, largest_weight: int, epsilon: float) -> float:
    """About the noise multiplier of a run of this epsilon with this plan; a guess, and rather low.

    T steps are taken as mu-GDP with mu = q sqrt(T) / sigma, and this as zCDP: epsilon = rho + 2 sqrt(rho
    ln(1/delta)), rho = mu^2 / 2 (Bun and Steinke 2016, proposition 1.3).
    """
    log_delta = math.log(10 * largest_weight)
    mu = math.sqrt(2) * (math.sqrt(log_delta + epsilon) - math.sqrt(log_delta))
    noise = _LOW_GUESS * plan.privacy.sampling_rate * math.sqrt(plan.federation.rounds) / mu
    return max(noise, _LEAST_NOISE, plan.privacy.minimum_noise_multiplier)


def _first_range(plan: PublicPlan, size: int, *, largest_weight: int) -> float:
    """Up to where a hospital's weighted update reaches in a parameter of so many numbers, as a guess."""
    training, steps = plan.training, plan.privacy.local_steps
    rate = training.learning_rate
    if training.optimizer == "adam-bc":  # more where the square of a gradient is hardly above its noise
        sigma = _expected_noise(plan, largest_weight=largest_weight, epsilon=_FIRST_EPSILON[8])
        noise = sigma * plan.privacy.l2_clip_norm / (plan.privacy.sampling_rate * largest_weight)
        return largest_weight * rate * steps * math.sqrt(1 + noise**2 / training.adam_bc_floor)
    if training.optimizer != "sgd":  # a step is about the learning rate in every number
        return largest_weight * rate * steps
    m = training.momentum
    coherent = (steps - m * (1 - m**steps) / (1 - m)) / (1 - m)  # as in `update_norm_bound`
    gradient = min(1.0, _HEAVY_TAIL / math.sqrt(size))
    if not plan.federation.private:
        return largest_weight * rate * coherent * gradient
    clip = plan.privacy.l2_clip_norm
    noise = noise_in_update(plan, round_number=1) * coherent / math.sqrt(steps)
    return max(largest_weight * rate * coherent * gradient * clip, _NOISE_INSIDE * noise)


def next_grid(
    plan: PublicPlan,
    grid: Grid,
    updates: Sequence[SpooledLevels],
    template: Template,
    *,
    round_number: int,
    noise_multipliers: Sequence[float],
    heavier: float,
) -> tuple[int, ...]:
    """Exponents for the round after `round_number`; `updates` are those that were averaged in it.

    `noise_multipliers` are all that hospitals have stated in the run, `heavier` is the largest weight of any
    hospital of the run over the largest one among `updates`.
    """
    if round_number >= plan.federation.rounds:
        return grid.exponents
    if is_noise_known(plan):
        exponent = _noise_exponent(plan, noise_multipliers, bits=grid.bits, round_number=round_number + 1)
        return (exponent,) * len(template)
    before, after = (
        learning_rate(plan.training, round_number=number, num_rounds=plan.federation.rounds)
        for number in (round_number, round_number + 1)
    )
    return _grid_after_updates(grid, updates, template, growth=heavier * after / before)


def _noise_exponent(
    plan: PublicPlan, noise_multipliers: Sequence[float], *, bits: int, round_number: int
) -> int:
    """Fine enough for the least noise; coarser, up to that noise itself, where the largest must fit in."""
    unit = noise_in_update(plan, round_number=round_number)
    least, most = unit * min(noise_multipliers), unit * max(noise_multipliers)
    fine, coarsest = (math.floor(math.log2(share * least)) for share in (FINE, 1.0))
    inside = _exponent(_NOISE_INSIDE * most / LARGEST[bits])
    return min(max(fine, min(inside, coarsest), _LOWEST), _HIGHEST)


def _grid_after_updates(
    grid: Grid, updates: Sequence[SpooledLevels], template: Template, *, growth: float
) -> tuple[int, ...]:
    """Exponents for the round after these updates, which are expected to be larger by `growth`."""
    wanted = []
    for old, (stretch, spacing) in zip(grid.exponents, grid.scales(template), strict=True):
        reach = max((_reach(update, stretch) for update in updates[:_HOSPITALS]), default=0)
        if reach == 0:
            wanted.append(old - _FINER_WHEN_ZERO)
        else:
            wanted.append(_exponent(_HEADROOM[grid.bits] * growth * reach * spacing / grid.largest))
    least = max(max(wanted, default=0) - _RANGE_OF_EXPONENTS, _LOWEST)
    return tuple(min(max(exponent, least), _HIGHEST) for exponent in wanted)


def _reach(update: SpooledLevels, stretch: slice) -> int:
    """What all but one in a thousand of the numbers stay below, of a sample that is the same every time."""
    seen = np.abs(np.concatenate([update.whole(*window) for window in _windows(stretch)]))
    place = math.ceil(_PERMILLE * (len(seen) - 1))
    return int(np.partition(seen, place)[place])


def _windows(stretch: slice) -> Iterator[tuple[int, int]]:
    length = stretch.stop - stretch.start
    if length <= _WINDOWS * _WINDOW:
        yield stretch.start, stretch.stop
        return
    for number in range(_WINDOWS):
        start = stretch.start + (length - _WINDOW) * number // (_WINDOWS - 1)
        yield start, start + _WINDOW


def _sizes(template: Template) -> list[int]:
    return [math.prod(template[name]) for name in sorted(template)]


def _exponent(spacing: float) -> int:
    """Base-2 logarithm of the least power of two that is no smaller, within what a hospital accepts."""
    return min(max(math.ceil(math.log2(spacing)), _LOWEST), _HIGHEST)
