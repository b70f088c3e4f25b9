"""The checks of the start-up self-test (`client.self_test.start`), on the production functions of a round.

Each returns why it is red, or "". A statistical one is red by chance with probability of about 1e-6.
"""

import secrets
from dataclasses import replace

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from client import private_training
from client.patient_optimizer import PatientDPOptimizer
from client.self_test.setup import Probe, Setup, Vector, few_units, flat, noted_gradients
from client.training import decay_weights, learning_rate, make_optimizer
from common.examples import Examples
from common.models.registry import parameter_template, read_parameters
from common.parameters import Parameters, difference
from common.privacy.randomness import Integers, RandomnessSource, ReproducibleRandomness, SecureRandomness

ALPHA = 1e-6
_FEWEST_NUMBERS = 40_000
"""Noise values that are looked at: a standard deviation off by 5 % is 14 standard errors away."""
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
            together[clip] = probe.sum_of(probe.units, clip=clip)
        in_company = together[clip] - probe.sum_of(probe.without(unit), clip=clip)
        # A hundredth: kernels round differently for other batches; a coupled loss or layer is far above.
        if not np.linalg.norm(in_company - alone) <= 0.01 * np.linalg.norm(alone) + 1e-5 * clip:
            return "the gradient of one patient depends on who is computed with them"
    return ""


def check_noise(setup: Setup) -> str:
    """A step without patients releases noise of the charged scale in every parameter, fresh each time."""
    model = setup.model()
    squares, count = 0.0, 0
    while count < _FEWEST_NUMBERS:
        first, second = (_noise_of_nobody(model, setup) for _ in range(2))
        for values in (*first, *second):
            if len(values) > 3 and not (values != values[0]).any():
                return "all numbers of a parameter were released with the same noise"
            if not _p_of_variance(values) > ALPHA / 1e5:
                return "a parameter was released with noise of another scale than charged"
        if all(map(np.array_equal, first, second)):
            return "two steps released the same noise"
        squares += sum(float(values @ values) for values in (*first, *second))
        count += sum(len(values) for values in (*first, *second))
    if not _p_of_squares(squares, count) > ALPHA:
        return f"the noise is {np.sqrt(squares / count):.4g} times what is charged"
    return ""


def _noise_of_nobody(model: nn.Module, setup: Setup) -> list[Vector]:
    """What a step without patients gives torch's optimiser, by parameter, in charged standard deviations."""
    with private_training.per_row_gradients(model):
        optimizer = PatientDPOptimizer(
            make_optimizer(model.parameters(), setup.plan.training, learning_rate=1e-6),
            plan=setup.privacy,
            randomness=SecureRandomness(),
            round_number=1,
        )
        with noted_gradients(model) as seen:
            optimizer.step()
    scale = setup.privacy.expected_batch_size / (
        setup.privacy.event().noise_multiplier * setup.privacy.l2_clip_norm
    )
    return [flat([gradient]) * scale for gradient in seen[-1]]


def check_sampling(setup: Setup) -> str:
    """Units enter steps by Poisson sampling with the charged rate, with at most K rows each."""
    examples, rate = setup.examples, setup.privacy.event().sampling_rate
    present = np.unique(examples.units)
    if len(present) == 0:
        return ""
    draws = 10 if rate == 1 else min(_MOST_DRAWS, max(200, _MOST_INCLUSIONS // len(present)))
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
    p_of_total = _two_sided(stats.binom, int(times.sum()), units * draws, rate)
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


def check_release(setup: Setup) -> str:
    """What leaves is the trainable parameters, moved by the noised gradients and by nothing else."""
    own = few_units(setup)
    # Everybody enters, so that something is there to be hidden; the divisor is about the same.
    expected = max(1, round(setup.privacy.expected_batch_size))
    privacy = replace(setup.privacy, sampling_rate=1.0, enrolled_units=expected, steps=2)
    setup = replace(setup, privacy=privacy)
    randomness = ReproducibleRandomness(secrets.randbits(128), "self-test")
    model = setup.model()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    leaving, seen = _trained(setup, model, own, randomness)
    if difference(leaving, setup.weights).keys() != parameter_template(setup.plan.model_spec).keys():
        return "something other than the model's trainable parameters would leave"
    if any(not torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers()):
        return "a buffer of the model changed while it saw patients"
    if len(seen) != setup.privacy.event().steps:
        return "not as many noised steps ran as are charged"
    replayed = _replayed(setup, seen)
    if any(not np.array_equal(replayed[name], array) for name, array in leaving.items()):
        return "the new weights are not explained by the noised gradients"
    # The same noise without any patient.
    short = replace(setup, privacy=replace(privacy, steps=1))
    _, seen_of_nobody = _trained(short, model, own.select_units([]), randomness)
    return _not_private(flat(seen[0]), flat(seen_of_nobody[0]), setup=setup, units=own.num_units)


def _trained(
    setup: Setup, model: nn.Module, examples: Examples, randomness: RandomnessSource
) -> tuple[Parameters, list[list[Tensor]]]:
    """The weights after a round of these examples, and the gradients of each step."""
    with noted_gradients(model) as seen:
        result = private_training.train_privately(
            model=model,
            task=setup.task,
            examples=examples,
            preprocessing=setup.preprocessing,
            plan=setup.privacy,
            training=setup.plan.training,
            round_number=1,
            num_rounds=setup.plan.federation.rounds,
            randomness=randomness,
            device=setup.device,
        )
    return result.parameters, seen


def _replayed(setup: Setup, gradients: list[list[Tensor]]) -> Parameters:
    """The weights to which a fresh optimiser of the run comes with these gradients alone."""
    model, training = setup.model(), setup.plan.training
    rate = learning_rate(training, round_number=1, num_rounds=setup.plan.federation.rounds)
    parameters = list(model.parameters())
    optimizer = make_optimizer(parameters, training, learning_rate=rate)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        decay_weights(parameters, learning_rate=rate, weight_decay=training.weight_decay)
        optimizer.step()
    return read_parameters(model)


def _not_private(released: Vector, nobody: Vector, *, setup: Setup, units: int) -> str:
    """Why a step on a few units, and one on none with the same noise, are not sum plus noise, or ""."""
    privacy = setup.privacy
    scale = privacy.expected_batch_size / (privacy.event().noise_multiplier * privacy.l2_clip_norm)
    if not _p_of_variance(nobody * scale) > ALPHA:
        return "the optimiser received noise of another scale than charged"
    # float32 keeps 24 bits of each number.
    rounding = 2.0**-23 * float(np.linalg.norm(released) + np.linalg.norm(nobody))
    most = units * privacy.l2_clip_norm / privacy.expected_batch_size
    if not float(np.linalg.norm(released - nobody)) <= most * (1 + 1e-5) + rounding:
        return "the optimiser received more of the patients than clipping allows"
    return ""


def _p_of_variance(values: Vector) -> float:
    return _p_of_squares(float(values @ values), len(values))


def _p_of_squares(squares: float, count: int) -> float:
    """Two-sided probability of this sum of squares of standard normal numbers."""
    return _two_sided(stats.chi2, squares, count)


def _two_sided(distribution: "stats.rv_generic", value: float, *parameters: float) -> float:
    tails = distribution.cdf(value, *parameters), distribution.sf(value - 1e-9, *parameters)
    return float(2 * min(tails))
