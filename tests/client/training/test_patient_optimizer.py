import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import nn

from client.training import patient_optimizer
from client.training.patient_optimizer import PatientDPOptimizer, automatic_factors, clip_factors
from client.training.private import per_row_gradients
from common.config import TrainingConfig
from common.errors import GuardError
from common.privacy.noise import rounding_of_sums
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from tests.client.training.dp_oracle import (
    accumulate_all,
    clipped_sum,
    make_dp_optimizer,
    make_plan,
    noise_of_step,
    oracle_clipped_sum,
    patient_gradient,
    random_rows,
    relative_error,
    small_network,
    summed,
)

RAGGED = np.repeat(np.arange(6), [1, 5, 2, 1, 4, 3])


def neighbour(kind):
    """Images, targets and patients in which the last patient is `kind` of odd."""
    units = np.repeat(np.arange(9), [1, 3, 1, 2, 1, 1, 4, 1, 2])
    inputs, targets = random_rows(units, seed=3)
    odd = units == 8
    if kind == "scaled":
        inputs[odd] *= 1e4
    elif kind == "rare class":
        targets[:] = 0
        targets[odd] = 1
    elif kind == "duplicate":
        inputs[odd] = inputs[:1].clone()
        targets[odd] = targets[:1].clone()
    elif kind in ("nan", "inf"):
        inputs[np.flatnonzero(odd)[:1], 0, 2, 2] = float(kind)
    elif kind == "alone":
        inputs, targets, units = inputs[odd] * 100, targets[odd], units[odd]
        odd = units == 8
    return inputs, targets, units, odd


@pytest.mark.parametrize("max_rows", [1, 2, 4, 100])
@pytest.mark.parametrize("kind", ["scaled", "rare class", "duplicate", "nan", "inf", "alone"])
@pytest.mark.parametrize("clip", [0.05, 1.0])
def test_adding_a_patient_moves_the_sum_by_at_most_c(kind, max_rows, clip):
    model = small_network()
    inputs, targets, units, odd = neighbour(kind)
    kept = torch.from_numpy(~odd)
    with_patient = clipped_sum(model, inputs, targets, units, clip=clip, max_rows=max_rows)
    without = clipped_sum(model, inputs[kept], targets[kept], units[~odd], clip=clip, max_rows=max_rows)
    moved = float((with_patient - without).norm())
    assert with_patient.isfinite().all()
    assert moved <= clip * (1 + 1e-5)
    if kind in ("nan", "inf"):
        assert moved <= 1e-5 * clip  # such a patient counts as zero
    if kind in ("scaled", "alone"):
        # The bound is what holds it: unclipped this patient would move the sum further.
        assert float(patient_gradient(model, inputs[odd], targets[odd]).norm()) > 1.1 * clip


@pytest.mark.parametrize("norm", [0.0, 1e-30, 1e-6, 0.01, 1.0, 1e9, 1e18, 1.1e18, math.inf, math.nan])
@pytest.mark.parametrize("clip", [1e-12, 0.05, 1.0, 100.0])
def test_automatic_clipping_keeps_every_norm_below_c(norm, clip):
    factor = float(automatic_factors(torch.tensor([norm], dtype=torch.float64), l2_clip_norm=clip))
    if not norm <= 1e18:
        assert factor == 0
    else:
        assert factor == pytest.approx(clip / (norm + 0.01))
        assert norm * factor <= clip * (1 + 1e-15)


@pytest.mark.parametrize("max_rows", [1, 3, 100])
@pytest.mark.parametrize("kind", ["scaled", "rare class", "duplicate", "nan", "inf", "alone"])
def test_adding_a_patient_moves_the_automatically_clipped_sum_by_at_most_c(kind, max_rows):
    model = small_network()
    inputs, targets, units, odd = neighbour(kind)
    kept = torch.from_numpy(~odd)
    sums = [
        clipped_sum(model, *rows, clip=2.0, max_rows=max_rows, clipping="automatic")
        for rows in ((inputs, targets, units), (inputs[kept], targets[kept], units[~odd]))
    ]
    moved = float((sums[0] - sums[1]).norm())
    assert sums[0].isfinite().all()
    assert moved <= 2.0 * (1 + 1e-5)
    if kind in ("nan", "inf"):
        assert moved <= 1e-5
    else:
        # Also what is far below C is brought near it: with flat clipping most of these stay where they are.
        assert moved >= 2.0 * 0.9


def test_automatic_clipping_is_as_in_the_paper():
    model = small_network()
    inputs, targets = random_rows(RAGGED)
    found = clipped_sum(model, inputs, targets, RAGGED, clip=0.3, clipping="automatic")
    expected = oracle_clipped_sum(model, inputs, targets, RAGGED, clip=0.3, clipping="automatic")
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("clip", [1e-3, 1e-12, 1e-20, 1e-27, 1e-30])
def test_a_tiny_clip_holds_or_is_refused(clip):
    """Weights may be sure of every verdict, so that squares of gradients vanish in float32."""
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[2].bias.copy_(torch.tensor([57.0, 0.0]))
    inputs, targets = random_rows([0])
    try:
        moved = float(clipped_sum(model, inputs, targets * 0, [0], clip=clip).norm())
    except GuardError:
        assert clip < 1e-9
    else:
        assert moved <= clip * (1 + 1e-5)


def test_trap_8_one_broken_image_silences_its_patient_only():
    model = small_network()
    inputs, targets = random_rows(RAGGED)
    inputs[2] = math.nan  # patient 1
    others = torch.from_numpy(RAGGED != 1)
    expected = oracle_clipped_sum(model, inputs[others], targets[others], RAGGED[RAGGED != 1])
    assert relative_error(clipped_sum(model, inputs, targets, RAGGED), expected) < 1e-5


def test_clip_factors_have_no_hole_and_no_excess():
    norms = torch.tensor([0.0, 1e-12, 1 - 1e-9, 1.0, 1 + 1e-9, 7.0, 1e17, 1e19, math.inf, math.nan]).double()
    factors = clip_factors(norms, l2_clip_norm=1.0)
    assert factors[:4].tolist() == [1, 1, 1, 1]
    assert ((factors * norms)[:7] <= 1 + 1e-12).all()
    assert (factors * norms)[4:7].tolist() == pytest.approx([1, 1, 1], rel=1e-12)
    assert factors[7:].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("segments", "num_units"),
    [([0, 0, 1], 3), ([1, 0, 1], 2), ([0, 1, 2], 2), ([0, 2, 2], 3), ([0, 0, 0], 0)],
)
def test_impossible_segments_are_refused(segments, num_units):
    model = small_network()
    inputs, targets = random_rows(segments)
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan())
        nn.functional.cross_entropy(wrapped(inputs), targets, reduction="sum").backward()
        with pytest.raises(ValueError, match="segments"):
            optimizer.accumulate(torch.tensor(segments), num_units)


def released(model):
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("num_patients", [0, 1, 6])
def test_traps_9_and_11_release_is_sum_plus_noise_over_the_expected_batch_size(num_patients):
    plan = make_plan(sampling_rate=0.3, enrolled_units=70, l2_clip_norm=0.2, noise_multiplier=2.5)
    randomness = ReproducibleRandomness(5, "one")
    model = small_network()
    units = RAGGED[num_patients > RAGGED]
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, plan, randomness=randomness)
        accumulate_all(wrapped, optimizer, *random_rows(units), units, max_rows=5)
        clean = summed(model)
        optimizer.step()
        expected = (clean + noise_of_step(model, plan, randomness)) / 21
        assert relative_error(released(model), expected) < 1e-6
        assert summed(model).norm() == 0
        assert (clean.norm() > 0) == (num_patients > 0)


def steps_of_noise(steps, *, hospital_randomness, plan):
    """Release minus clipped sum over several steps, (steps, parameters), in units of sigma * C."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 60), nn.Tanh(), nn.Linear(60, 2))
    inputs, targets = random_rows(RAGGED)
    found = []
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, plan, randomness=hospital_randomness)
        for _ in range(steps):
            accumulate_all(wrapped, optimizer, inputs, targets, RAGGED, max_rows=6)
            clean = summed(model)
            optimizer.step()
            found.append((released(model) * plan.expected_batch_size - clean) / plan.noise_stddev)
    return torch.stack(found).numpy(), [p.numel() for p in model.parameters()]


def assert_variance_is_one(values, alpha):
    tail = chi2.cdf(float((values**2).sum()), values.size)
    assert alpha / 2 < tail < 1 - alpha / 2


@pytest.mark.parametrize("source", [SecureRandomness, lambda: ReproducibleRandomness(3, "one")])
def test_noise_is_calibrated_and_independent(source):
    plan = make_plan(l2_clip_norm=0.3, noise_multiplier=1.7, steps=12)
    noise, sizes = steps_of_noise(12, hospital_randomness=source(), plan=plan)
    other, _ = steps_of_noise(12, hospital_randomness=ReproducibleRandomness(3, "two"), plan=plan)
    # 1. Variance over all values (off by 1.5 % would show), and of every parameter alone.
    assert_variance_is_one(noise, 1e-6)
    for block in np.split(noise, np.cumsum(sizes)[:-1], axis=1):
        assert_variance_is_one(block, 1e-7)
    assert abs(noise.mean()) * math.sqrt(noise.size) < 5.5
    # 2. No step and no hospital uses the noise of another; 5.5 standard errors.
    standard_error = 1 / math.sqrt(noise.shape[1])
    across_steps = np.corrcoef(noise) - np.eye(len(noise))
    assert abs(across_steps).max() < 5.5 * standard_error
    across_hospitals = noise @ other.T / noise.shape[1]
    assert abs(across_hospitals).max() < 5.5 * standard_error
    # 3. Nor does a value of the noise repeat inside a step.
    assert len(np.unique(noise[0].round(9))) > 0.99 * noise.shape[1]


def test_trap_12_noise_ignores_the_global_torch_seed():
    # With Opacus' default two hospitals with one seed would draw the same noise.
    noises = []
    for _ in range(2):
        torch.manual_seed(1)
        noises.append(steps_of_noise(1, hospital_randomness=SecureRandomness(), plan=make_plan())[0][0])
    assert abs(noises[0] @ noises[1]) / len(noises[0]) < 5.5 / math.sqrt(len(noises[0]))
    state = torch.get_rng_state()
    optimizer = make_dp_optimizer(small_network(), make_plan())
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)


def test_rounds_differ_in_their_noise():
    plan, releases = make_plan(), []
    for round_number in (1, 2):
        model = small_network()
        make_dp_optimizer(model, plan, round_number=round_number).step()
        releases.append(released(model))
    assert relative_error(releases[0], releases[1]) > 0.5


def test_adam_sees_the_noised_gradient_only():
    model = small_network()
    inputs, targets = random_rows(RAGGED)
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan(), training=TrainingConfig(optimizer="adam"))
        accumulate_all(wrapped, optimizer, inputs, targets, RAGGED, max_rows=5)
        clean = summed(model) / make_plan().expected_batch_size
        optimizer.step()
        state = optimizer.original_optimizer.state
        first = torch.cat([state[p]["exp_avg"].double().flatten() for p in model.parameters()]) / 0.1
        second = torch.cat([state[p]["exp_avg_sq"].double().flatten() for p in model.parameters()]) / 0.001
        assert relative_error(first, released(model)) < 1e-5
        assert relative_error(second, released(model).square()) < 1e-4
        assert relative_error(first, clean) > 1


@pytest.mark.parametrize("name", ["max_grad_norm", "noise_multiplier", "expected_batch_size"])
def test_trap_2_numbers_of_the_plan_cannot_be_changed(name):
    optimizer = make_dp_optimizer(small_network(), make_plan())
    planned = getattr(optimizer, name)
    with pytest.raises(GuardError, match=name):
        setattr(optimizer, name, planned * 0.01)
    assert getattr(optimizer, name) == planned


def test_trap_2_opacus_schedulers_are_refused():
    from opacus.schedulers import ExponentialGradClip, ExponentialNoise

    optimizer = make_dp_optimizer(small_network(), make_plan())
    for scheduler in (ExponentialGradClip, ExponentialNoise):
        with pytest.raises(GuardError):
            scheduler(optimizer, gamma=0.1).step()


def test_only_the_planned_steps_run():
    optimizer = make_dp_optimizer(small_network(), make_plan(steps=2))
    optimizer.step()
    optimizer.step()
    with pytest.raises(GuardError, match="2 steps"):
        optimizer.step()
    assert optimizer.steps_taken == 2


def test_other_ways_to_step_are_refused():
    model = small_network()
    inputs, targets = random_rows(RAGGED)
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan())
        for call in (
            optimizer.clip_and_accumulate,
            optimizer.signal_skip_step,
            lambda: optimizer.attach_step_hook(print),
            lambda: optimizer.step(lambda: 0.0),
        ):
            with pytest.raises(GuardError):
                call()
        nn.functional.cross_entropy(wrapped(inputs), targets, reduction="sum").backward()
        with pytest.raises(GuardError, match="not accumulated"):
            optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(GuardError, match="gradient for each row"):
            optimizer.accumulate(torch.zeros(len(RAGGED), dtype=torch.int64), 1)


def test_two_backwards_before_accumulate_are_refused():
    model = small_network()
    inputs, targets = random_rows([0, 1])
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan())

        def step():
            for _ in range(2):
                nn.functional.cross_entropy(wrapped(inputs), targets, reduction="sum").backward()
            optimizer.accumulate(torch.tensor([0, 1]), 2)

        with pytest.raises(GuardError, match="gradient for each row"):
            step()


def test_it_is_one_step_under_opacus():
    from opacus.optimizers import DPOptimizer

    assert PatientDPOptimizer.__bases__ == (DPOptimizer,)


def whole_numbers(optimizer, model):
    """What one step releases, before the division, in grid points; float64, exact below 2**53."""
    seen = []
    real = patient_optimizer.release

    def noting(summed, *, into, grid, stream, divisor):
        whole = np.empty(len(into))
        real(summed, into=whole, grid=grid, stream=stream, divisor=grid.spacing)
        seen.append(torch.from_numpy(whole))
        into[:] = whole * (grid.spacing / divisor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patient_optimizer, "release", noting)
        optimizer.add_noise()
    assert len(seen) == len(list(model.parameters()))
    return torch.cat(seen)


def test_floating_point_what_is_released_are_whole_numbers_of_the_grid():
    """The neighbour: with the same noise releases differ by the patient alone, up to a grid point each."""
    model, plan = small_network(), make_plan(l2_clip_norm=0.3)
    inputs, targets = random_rows(RAGGED)
    patient, sums, releases = RAGGED == 3, [], []
    for kept in (np.ones(len(RAGGED), dtype=bool), ~patient, patient):
        with per_row_gradients(model) as wrapped:
            optimizer = make_dp_optimizer(model, plan, randomness=ReproducibleRandomness(2, "one"))
            rows = torch.from_numpy(kept)
            accumulate_all(wrapped, optimizer, inputs[rows], targets[rows], RAGGED[kept], max_rows=1)
            sums.append(summed(model) / optimizer.grid.spacing)
            releases.append(whole_numbers(optimizer, model))
            # From outside: what leaves is a float32 next to a whole number of the grid.
            outside = released(model) * plan.expected_batch_size / optimizer.grid.spacing
            assert ((outside - releases[-1]).abs() <= 2.0**-23 * outside.abs()).all()
    for numbers in releases:
        assert torch.equal(numbers, numbers.round())
        assert numbers.abs().max() < 2**53
    # Each sum is rounded to the nearest grid point, which is what the noise was raised for.
    moved = releases[0] - releases[1]
    assert ((moved - (sums[0] - sums[1])).abs() <= 1).all()
    assert (sums[0] - sums[1] - sums[2]).norm() * optimizer.grid.spacing <= rounding_of_sums(6) * 0.3
    grown = float(moved.norm()) * optimizer.grid.spacing
    assert grown <= plan.l2_clip_norm * optimizer.grid.noise_stddev / plan.noise_stddev
