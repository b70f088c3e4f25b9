"""The checks of the start-up self-test (`client.self_test.start`), on the production functions of a round.

Each returns why it is red, or "". A statistical one is red by chance with probability of about 1e-6.
"""

import itertools
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats
from torch import nn

from client.self_test.augmentation_checks import coupled_augmentation
from client.self_test.setup import (
    PRODUCTION,
    Probe,
    Setup,
    Vector,
    flat,
    is_large,
    noted_gradients,
    seeded_alike,
    steps_tried,
)
from client.training import patient_optimizer
from client.training import private as private_training
from client.training.patient_optimizer import PatientDPOptimizer
from client.training.plain import make_optimizer
from common.privacy.noise import NoiseGrid
from common.privacy.randomness import Integers, SecureRandomness

ALPHA = 1e-6
_FEWEST_NUMBERS = 40_000
"""Noise values that are looked at: a standard deviation off by 5 % is 14 standard errors away."""
OPTIMIZER: Any = patient_optimizer
_FEW_NUMBERS = 4096
"""Noise values and patients of which it is asked whether they come again."""
_ROUNDING_OF_SUMS = 1e-11
"""What float64 sums of the probe's few units may differ by, over C."""
_MOST_DRAWS, _MOST_INCLUSIONS = 2000, 20_000_000
"""Steps that are drawn; fewer in a hospital of more than 10,000 patients, where each says more."""


def check_clipping(setup: Setup) -> str:
    """No unit, however extreme, moves the clipped sum by more than C."""
    probe = Probe(setup)
    # Below the norm that a patient's gradient has here, so that something is clipped.
    gradient, _ = probe.unclipped(0)
    clip = min(setup.privacy.l2_clip_norm, 0.5 * max(float(np.linalg.norm(gradient)), 1e-3))
    together = probe.sum_of(probe.units, clip=clip)
    for unit in probe.telling:
        moved = float(np.linalg.norm(together - probe.sum_of(probe.without(unit), clip=clip)))
        if not moved <= clip * (1 + 1e-5):
            return f"one patient moved the sum by {moved / clip:.6g} times the clipping norm"
    return ""


def check_coupling(setup: Setup) -> str:
    """A unit's gradient, before any clipping, is the same alone and in company."""
    probe = Probe(setup)
    together: dict[float, Vector] = {}
    for unit in probe.ordinary:
        alone, clip = probe.unclipped(unit)
        if clip not in together:
            together[clip] = probe.sum_of(probe.units, clip=clip, clipping="flat")
        in_company = together[clip] - probe.sum_of(probe.without(unit), clip=clip, clipping="flat")
        # A hundredth: kernels round differently for other batches; a coupled loss or layer is far above.
        if not np.linalg.norm(in_company - alone) <= 0.01 * np.linalg.norm(alone) + 1e-5 * clip:
            return "the gradient of one patient depends on who is computed with them"
    return ""


def check_places(setup: Setup) -> str:
    """A clipped contribution has the same bits alone and in company, with the weights that arrived.

    On random images: weights could be made for which this is red with a certain patient alone, and that the
    hospital refused does leave.
    """
    probe = Probe(setup.of_nobody(), scaled=False)
    clip = setup.privacy.l2_clip_norm
    together = probe.sum_of(probe.units, clip=clip)
    # Sums in float64 differ with their order by far less than one last bit of float32 would move them.
    rounding = _ROUNDING_OF_SUMS * clip
    for unit in probe.telling if not is_large(probe.model) else [secrets.choice(probe.telling)]:
        alone, others = probe.sum_of([unit], clip=clip), probe.without(unit)[::-1]
        if not np.linalg.norm(together - alone - probe.sum_of(others, clip=clip)) <= rounding:
            return "the last bits of a patient's gradient depend on who is computed with them, or where"
    return coupled_augmentation(setup)


def check_noise(setup: Setup) -> str:
    """Steps without patients release noise of the charged scale in every parameter, fresh in each step."""
    model = setup.model()
    squares, count = 0.0, 0
    while count < _FEWEST_NUMBERS:
        steps = _noise_of_nobody(model, setup)
        for values in [values for step in steps for values in step]:
            if len(values) > 3 and not (values != values[0]).any():
                return "all numbers of a parameter were released with the same noise"
            if not p_of_variance(values) > ALPHA / 1e5:
                return "a parameter was released with noise of another scale than charged"
            squares += float(values @ values)
            count += len(values)
        for first, second in itertools.combinations([np.concatenate(step) for step in steps], 2):
            if not p_of_correlation(first, second) > ALPHA / 1000:
                return "the noise of one step tells that of another"
        if any(not p_of_correlation(*parts) > ALPHA / 1e5 for parts in _parts_of_step(steps[0])):
            return "parts of one step were released with the same noise"
    if not p_of_squares(squares, count) > ALPHA:
        return f"the noise is {np.sqrt(squares / count):.4g} times what is charged"
    return _not_unknown(setup)


def _parts_of_step(step: list[Vector]) -> Iterator[tuple[Vector, Vector]]:
    """Pairs of equally long stretches: beginnings of parameters, and of what may be parts of large ones."""
    starts = [0, *(1 << power for power in range(_FEW_NUMBERS.bit_length(), 32))]
    parts = [values[start : start + _FEW_NUMBERS] for values in step for start in starts]
    for first, second in itertools.combinations([part for part in parts if len(part) >= 64], 2):
        length = min(len(first), len(second))
        yield first[:length], second[:length]


def _not_unknown(setup: Setup) -> str:
    """Why noise or draws could be known to others, or are not in whole numbers, or ""."""
    where = {"round_number": 1, "step": 0}
    grid = NoiseGrid.of(setup.privacy, num_parameters=_FEW_NUMBERS)
    noises, draws = [], []
    for _ in range(2):
        with seeded_alike():
            stream = SecureRandomness().stream(purpose="noise", **where)
            noises.append(np.empty(_FEW_NUMBERS))
            OPTIMIZER.release(None, into=noises[-1], grid=grid, stream=stream, divisor=grid.spacing)
            stream = SecureRandomness().stream(purpose="sampling", **where)
            draws.append(PRODUCTION.poisson_sample(_FEW_NUMBERS, 0.5, stream))
    if any((noise != np.rint(noise)).any() for noise in noises):
        return "the noise is not in whole numbers of the grid"
    if np.array_equal(noises[0], noises[1]):
        return "the noise follows from a seed"
    if np.array_equal(draws[0], draws[1]):
        return "who enters a step follows from a seed"
    return ""


def _noise_of_nobody(model: nn.Module, setup: Setup) -> list[list[Vector]]:
    """What steps without patients give torch's optimiser, by parameter, in charged standard deviations."""
    privacy = replace(setup.privacy, steps=steps_tried(model))
    with private_training.per_row_gradients(model):
        optimizer = PatientDPOptimizer(
            make_optimizer(model.parameters(), setup.plan.training, learning_rate=1e-6, privacy=privacy),
            plan=privacy,
            randomness=SecureRandomness(),
            round_number=1,
        )
        with noted_gradients(model) as seen:
            for _ in range(privacy.steps):
                optimizer.step()
    scale = setup.privacy.expected_batch_size / (
        setup.privacy.event().noise_multiplier * setup.privacy.l2_clip_norm
    )
    return [[flat([gradient]) * scale for gradient in step] for step in seen]


def check_sampling(setup: Setup) -> str:
    """Units enter steps by Poisson sampling with the charged rate, with at most K rows each."""
    examples, rate = setup.examples, setup.privacy.event().sampling_rate
    present = np.unique(examples.units)
    if len(present) == 0:
        return ""
    draws = 10 if rate == 1 else min(_MOST_DRAWS, max(200, _MOST_INCLUSIONS // len(present)))
    stream = SecureRandomness().stream(purpose="sampling", round_number=1, step=0)
    rare = replace(setup.privacy, sampling_rate=min(rate, 1e-12 / examples.num_units))
    if len(private_training.rows_of_step(examples, rare, stream)[0]):
        return "a step that nobody enters is given a patient"
    times, sizes, overlap = np.zeros(examples.num_units, np.int64), np.zeros(draws, np.int64), 0
    before = np.zeros(examples.num_units, dtype=bool)
    for step in range(draws):
        stream = SecureRandomness().stream(purpose="sampling", round_number=1, step=step)
        rows, segments = private_training.rows_of_step(examples, setup.privacy, stream)
        starts = np.flatnonzero(np.diff(segments, prepend=-1))
        lengths = np.diff(np.append(starts, len(rows)))
        units = examples.units[rows[starts]]
        if len(rows) and lengths.max() > setup.privacy.max_rows_per_unit:
            return "more images of one patient enter a step than planned"
        now = np.zeros_like(before)
        now[units] = True
        if not np.array_equal(examples.units[rows], np.repeat(units, lengths)) or now.sum() != len(units):
            return "images of one patient are not clipped together, or those of two patients are"
        times[units] += 1
        sizes[step], overlap, before = len(units), overlap + int((now & before).sum()), now
    return not_poisson(times[present], sizes, overlap=overlap, rate=rate)


def not_poisson(times: Integers, sizes: Integers, *, overlap: int, rate: float) -> str:
    """Why draws are not independent inclusions with probability `rate`, or "".

    times: (units,) how often each entered. sizes: (draws,) how many did. overlap: those who entered two draws
    in a row, summed over all pairs of draws.
    """
    units, draws = len(times), len(sizes)
    if rate == 1:
        return "" if (sizes == units).all() else "not every patient entered a step of the full batch"
    p_of_total = two_sided(stats.binom, int(times.sum()), units * draws, rate)
    if not p_of_total > ALPHA:
        return f"patients enter {times.sum() / (units * draws * rate):.4g} times as often as charged"
    most, least = stats.binom.sf(times.max() - 1, draws, rate), stats.binom.cdf(times.min(), draws, rate)
    if not 2 * units * min(most, least) > ALPHA:
        return "one patient enters more or less often than others"
    variance = units * rate * (1 - rate)
    if draws * variance >= 200:
        # Squares of binomial numbers: a gamma distribution of their mean and variance.
        spread = np.sum(np.square(sizes - units * rate)) / variance
        scale = (2 + (1 - 6 * rate * (1 - rate)) / variance) / 2
        tails = stats.gamma(draws / (2 * scale), scale=2 * scale)
        if not 2 * min(tails.cdf(spread), tails.sf(spread)) > ALPHA / 100:
            return "the number of patients in a step does not vary as in Poisson sampling"
    pairs = units * (draws - 1)
    if pairs * (rate * (1 - rate)) ** 2 >= 1000:
        both_ends = 2 * sizes.sum() - sizes[0] - sizes[-1]
        centred = (overlap - rate * both_ends + pairs * rate**2) / (rate * (1 - rate) * np.sqrt(pairs))
        if not 2 * stats.norm.sf(abs(centred)) > ALPHA / 100:
            return "who enters a step depends on who entered the one before"
    return ""


def p_of_variance(values: Vector) -> float:
    """Two-sided probability of this spread of standard normal numbers."""
    return p_of_squares(float(values @ values), len(values))


def p_of_correlation(first: Vector, second: Vector) -> float:
    """Two-sided probability of the correlation of two vectors of independent noise."""
    correlation = float(first @ second) / np.sqrt(first @ first) / np.sqrt(second @ second)
    return float(2 * stats.norm.sf(abs(correlation) * np.sqrt(len(first))))


def p_of_squares(squares: float, count: int) -> float:
    """Two-sided probability of this sum of squares of standard normal numbers."""
    return two_sided(stats.chi2, squares, count)


def two_sided(distribution: "stats.rv_generic", value: float, *parameters: float) -> float:
    """Probability of a value at least as far out, on either side."""
    tails = distribution.cdf(value, *parameters), distribution.sf(value - 1e-9, *parameters)
    return float(2 * min(tails))
