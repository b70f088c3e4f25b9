"""The spacings that the server announces: from public numbers, fine enough, not shaken by one hospital."""

import math

import numpy as np
import pytest

from common.config import PublicPlan
from common.parameters import num_parameters
from common.quantisation import LARGEST, Grid, Levels
from common.schedule import learning_rate
from common.settings import parse
from server.spool import Spool
from server.update_grid import FINE, first_grid, grid_of, next_grid, noise_in_update

TEMPLATE = {"a": (5000,), "b": (20, 30), "c": ()}


def plan_of(**sections):
    values = {"federation": {"rounds": 20}, "training": {"learning-rate": 0.3}} | sections
    return parse(PublicPlan, values, source="test")


def no_updates(plan, noise, *, round_number=1, bits=8):
    return next_grid(
        plan,
        Grid(bits=bits, exponents=(0, 0, 0)),
        [],
        TEMPLATE,
        round_number=round_number,
        noise_multipliers=noise,
        heavier=1.0,
    )


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("sigma", [0.3, 1.7, 25.0])
@pytest.mark.parametrize("bits", [8, 4])
def test_under_privacy_the_spacing_follows_the_noise_and_holds_it(sigma, bits, schedule):
    training = {"learning-rate": 0.3, "learning-rate-schedule": schedule}
    plan = plan_of(training=training, wire={"bits": bits})
    for number in (1, 10, 19):
        (exponent,) = set(no_updates(plan, [sigma, 1.5 * sigma], round_number=number, bits=bits))
        rate = learning_rate(plan.training, round_number=number + 1, num_rounds=20)
        noise = rate * sigma * 1.0 / 0.5
        assert noise_in_update(plan, round_number=number + 1) * sigma == pytest.approx(noise)
        spacing = 2.0**exponent
        assert spacing <= (FINE if bits == 8 else 1.0) * noise
        assert spacing * LARGEST[bits] > (12 if bits == 8 else 2.3) * 1.5 * noise


def test_a_hospital_that_overstates_its_noise_cannot_coarsen_the_grid_beyond_the_others_noise():
    plan = plan_of()
    (exponent,) = set(no_updates(plan, [2.0, 1000.0]))
    assert 2.0**exponent <= noise_in_update(plan, round_number=2) * 2.0


SOLVED = {  # rounds and sampling rate: noise multipliers of epsilon 1, 3 and 8, as solved for delta 1e-4
    (5, 0.5): (3.882, 1.671, 0.855),
    (90, 0.5): (15.195, 5.897, 2.683),
    (120, 0.2): (7.112, 2.851, 1.406),
    (30, 1.0): (17.449, 6.7, 2.975),
}


@pytest.mark.parametrize("plan", SOLVED)
def test_the_first_guess_fits_runs_of_epsilon_one_to_eight(plan):
    """Fine enough for the noise of epsilon 8, and noise of epsilon 1 still lies within the bits."""
    rounds, rate = plan
    asked = plan_of(federation={"rounds": rounds}, privacy={"sampling-rate": rate})
    (exponent,) = set(first_grid(asked, TEMPLATE, largest_weight=1000))
    for sigma in SOLVED[plan]:
        noise = noise_in_update(asked, round_number=1) * sigma
        assert 2.0**exponent <= FINE * noise
        assert 127 * 2.0**exponent > 3 * noise


def test_small_models_and_32_bits_have_no_grid():
    assert first_grid(plan_of(wire={"bits": 32}), TEMPLATE, largest_weight=100) == ()
    assert first_grid(plan_of(), {"a": (4095,)}, largest_weight=100) == ()
    assert first_grid(plan_of(), {"a": (4096,)}, largest_weight=100)
    assert grid_of(plan_of(), ()) is None
    assert grid_of(plan_of(wire={"bits": 4}), (1, 2)) == Grid(bits=4, exponents=(1, 2))


OTHER_RUNS = {
    "plain": {"federation": {"private": False, "rounds": 20}},
    "adam": {"training": {"optimizer": "adam", "learning-rate": 0.002}},
    "steps": {"privacy": {"local-steps": 7}, "training": {"momentum": 0.9}},
    "reproducible": {"federation": {"reproducible": True, "rounds": 20}},
}


@pytest.mark.parametrize("run", OTHER_RUNS)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_kind_of_run_has_a_first_grid(run, bits):
    plan = plan_of(**OTHER_RUNS[run], wire={"bits": bits})
    grid = grid_of(plan, first_grid(plan, TEMPLATE, largest_weight=1000))
    assert len(grid.exponents) == 3
    heavier = grid_of(plan, first_grid(plan, TEMPLATE, largest_weight=10**9))
    assert all(high >= low for high, low in zip(heavier.exponents, grid.exponents, strict=True))


def levels_of(*scales, seed=0):
    """Whole numbers of normal noise, parameter by parameter."""
    random = np.random.default_rng(seed)
    sizes = [math.prod(TEMPLATE[name]) for name in sorted(TEMPLATE)]
    whole = np.concatenate(
        [np.rint(s * random.standard_normal(n)) for s, n in zip(scales, sizes, strict=True)]
    )
    fitting = np.clip(whole, -127, 127)
    places = np.flatnonzero(whole != fitting)
    return Levels(
        fitting=fitting.astype(np.int8),
        places=places.astype(np.uint32),
        rest=(whole - fitting)[places].astype(np.int32),
    )


def following(folder, updates, *, plan=None, bits=8, number=1, heavier=1.0, old=(0, 0, 0)):
    spool = Spool(folder, TEMPLATE)
    for index, update in enumerate(updates):
        spool.add(str(index), update)
    with spool.opened([str(index) for index in range(len(updates))]) as opened:
        return next_grid(
            plan or plan_of(**OTHER_RUNS["plain"]),
            Grid(bits=bits, exponents=old),
            opened,
            TEMPLATE,
            round_number=number,
            noise_multipliers=[],
            heavier=heavier,
        )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale", [0.3, 5.0, 40.0, 3000.0])
def test_without_known_noise_the_spacing_follows_the_numbers_of_the_round_before(tmp_path, scale, bits):
    """Also far beyond what fits. 3.3 deviations hold all but one in a thousand of normal numbers."""
    exponents = following(tmp_path, [levels_of(scale, 3 * scale, scale)], bits=bits)
    for exponent, one in zip(exponents[:2], (scale, 3 * scale), strict=True):
        reach = 2.0**exponent * LARGEST[bits] / max(one, 1 / 3)
        least = {8: 6.0, 4: 3.0}[bits]
        assert least < reach < 4 * least


def test_the_largest_hospital_decides_and_a_heavier_one_is_expected_back(tmp_path):
    alone = following(tmp_path, [levels_of(20, 20, 20)])
    assert following(tmp_path, [levels_of(20, 20, 20), levels_of(1, 1, 1, seed=1)]) == alone
    assert following(tmp_path, [levels_of(20, 20, 20)], heavier=8.0) == tuple(e + 3 for e in alone)


def test_the_spacing_follows_a_falling_step_size(tmp_path):
    training = {"learning-rate": 0.3, "learning-rate-schedule": "cosine"}
    plan = plan_of(federation={"private": False, "rounds": 20}, training=training)
    constant = following(tmp_path, [levels_of(20, 20, 20)], number=19)
    falling = following(tmp_path, [levels_of(20, 20, 20)], plan=plan, number=19)
    ratio = math.log2(
        learning_rate(plan.training, round_number=20, num_rounds=20)
        / learning_rate(plan.training, round_number=19, num_rounds=20)
    )
    assert all(abs(f - c - ratio) <= 1 for f, c in zip(falling[:2], constant[:2], strict=True))


def test_numbers_that_are_all_zero_get_a_finer_spacing_within_reason(tmp_path):
    old = (0, 0, 0)
    for _ in range(10):
        old = following(tmp_path, [levels_of(20, 0, 20)], old=old)
    assert old[1] == max(old) - 20
    nothing = (-98, -98, -98)
    assert following(tmp_path, [levels_of(0, 0, 0)], old=nothing) == (-100, -100, -100)


def test_the_last_round_has_no_successor(tmp_path):
    assert following(tmp_path, [levels_of(20, 20, 20)], number=20, old=(3, 4, 5)) == (3, 4, 5)
    assert num_parameters(TEMPLATE) == 5601
