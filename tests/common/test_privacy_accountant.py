"""The accountant against published numbers, other accountants, and its own inverse."""

import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from common.errors import BudgetError, RefusalCode
from common.privacy import calibration
from common.privacy.accountant import (
    epsilon,
    epsilon_prv,
    epsilon_rdp,
    fits,
    recomputed_epsilon,
    running_epsilon,
)
from common.privacy.calibration import affordable_steps, solve_noise_multiplier
from common.privacy.plan import PrivacyEvent


def event(sampling_rate, noise_multiplier, steps):
    return PrivacyEvent(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)


def gaussian_epsilon(noise_multiplier, steps, delta):
    """Exact epsilon of composed Gaussians (Balle & Wang 2018, Theorem 8), the slow way."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(eps):
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    return brentq(excess, 0, 500)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "expected", "tolerance"),
    [
        (0.04, 1.5, 2250, 1e-5, 7.32911, 1e-4),
        (150 / 60000, 1.3, 6000, 1e-5, 0.72422, 1e-4),
        (0.001, 1.0, 30000, 1e-7, 1.41550, 1e-4),
        (0.01, 4.0, 10000, 1e-5, 1.035, 0.01),
        (0.01, 4.0, 40000, 1e-5, 2.213, 0.01),
        (1 / 60, 4.0, 3840, 9e-6, 1.083, 1e-3),
        (1, 4.530877, 1, 1e-6, 1.0, 1e-4),
    ],
)
def test_rdp_rows_of_the_literature(q, sigma, steps, delta, expected, tolerance):
    assert epsilon_rdp([event(q, sigma, steps)], delta=delta) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "expected"),
    [
        (0.04, 1.5, 2249, 1e-5, 6.777396),
        (0.001, 0.8, 1000, 1e-6, 0.477771),
        (0.05, 1.5, 1000, 1e-6, 6.209969),
        (0.2, 3.0, 100, 1e-6, 3.381221),
    ],
)
def test_prv_rows_of_the_literature_and_pld_within_their_error(q, sigma, steps, delta, expected):
    events = [event(q, sigma, steps)]
    assert epsilon_prv(events, delta=delta) == pytest.approx(expected, abs=1e-5)
    # PRV publishes its upper bound with eps_error 0.01, so PLD lies just below it.
    assert expected - 0.021 <= epsilon(events, delta=delta) <= expected + 1e-3


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "expected", "tolerance"),
    [
        (0.2, 0.5, 3, 0.15594, 1.0, 1e-3),
        (1, math.sqrt(3), 3, 0.126936, 1.0, 1e-4),
        (0.01, 0.673793, 1, 1e-5, 1.0, 1e-4),
        (0.001, 3.209565 / 6, 25, 1e-5, 1.0, 1e-3),
        (1, 1.0, 1, 1e-5, 4.377178, 1e-4),
    ],
)
def test_pld_rows_of_the_literature(q, sigma, steps, delta, expected, tolerance):
    assert epsilon([event(q, sigma, steps)], delta=delta) == pytest.approx(expected, abs=tolerance)


def test_the_looser_accountants_bound_the_same_rows():
    for q, sigma, steps, delta in [(0.04, 1.5, 2250, 1e-5), (0.01, 4, 10000, 1e-5), (1, 4.530877, 1, 1e-6)]:
        events = [event(q, sigma, steps)]
        tight, prv, rdp = (f(events, delta=delta) for f in (epsilon, epsilon_prv, epsilon_rdp))
        assert tight <= prv <= tight + 0.021
        assert prv < rdp


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(1.0, 1, 1e-5), (20.0, 300, 1e-4), (3.0, 7, 1e-3)])
def test_full_batch_is_the_exact_gaussian(sigma, steps, delta):
    assert epsilon([event(1, sigma, steps)], delta=delta) == pytest.approx(
        gaussian_epsilon(sigma, steps, delta), abs=1e-4
    )


def test_edge_cases():
    assert epsilon([], delta=1e-5) == running_epsilon([], delta=1e-5) == 0.0
    assert epsilon([event(0.5, 1.0, 0)], delta=1e-5) == 0.0
    for cost in (epsilon, running_epsilon, epsilon_prv, epsilon_rdp, recomputed_epsilon):
        assert cost([event(0.5, 1.0, 3), event(0.5, 0.0, 1)], delta=1e-5) == math.inf
    for delta in (0.0, 1.0, -1e-5, math.nan):
        for events in ([], [event(0.5, 1.0, 1)]):
            with pytest.raises(ValueError, match="delta"):
                epsilon(events, delta=delta)


def test_equal_events_are_merged_and_order_does_not_matter():
    split = [event(0.5, 2.0, 3), event(0.1, 1.0, 5), event(0.5, 2.0, 7)]
    whole = [event(0.1, 1.0, 5), event(0.5, 2.0, 10)]
    assert epsilon(split, delta=1e-4) == epsilon(whole, delta=1e-4)


def test_composition_of_three_kinds_is_dp_accountings_own():
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    for q, sigma, steps in [(0.5, 4.0, 20), (0.1, 1.5, 40), (0.5, 4.0, 10)]:
        step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    accountant.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(30.0), 5))
    events = [event(0.5, 4.0, 20), event(0.1, 1.5, 40), event(0.5, 4.0, 10), event(1, 30.0, 5)]
    assert epsilon(events, delta=1e-4) == pytest.approx(accountant.get_epsilon(1e-4), abs=1e-6)
    assert recomputed_epsilon(events, delta=1e-4) == epsilon(events, delta=1e-4)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    q=st.sampled_from([0.05, 0.3, 0.8, 1.0]),
    sigma=st.floats(2, 20),
    steps=st.integers(1, 60),
    delta=st.sampled_from([1e-3, 1e-5]),
)
def test_monotone_bounded_by_rdp_and_by_the_running_bound(q, sigma, steps, delta):
    cost = epsilon([event(q, sigma, steps)], delta=delta)
    assert epsilon([event(q, sigma, steps + 5)], delta=delta) >= cost
    assert epsilon([event(q, sigma * 1.1, steps)], delta=delta) <= cost
    assert epsilon([event(q, sigma, steps)], delta=delta / 10) >= cost
    assert epsilon([event(q * 0.9, sigma, steps)], delta=delta) <= cost + 1e-9
    assert epsilon_rdp([event(q, sigma, steps)], delta=delta) >= cost - 1e-3
    assert cost - 1e-9 <= running_epsilon([event(q, sigma, steps)], delta=delta) <= cost * 1.005 + 1e-9


def test_rdp_does_not_warn_for_large_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < epsilon_rdp([event(0.5, 400.0, 60)], delta=1e-4) < 0.05


@settings(max_examples=3, deadline=None, derandomize=True)
@given(q=st.sampled_from([0.1, 0.5, 1.0]), steps=st.integers(1, 80), budget=st.sampled_from([0.5, 1.0, 3.0]))
def test_solved_noise_is_the_smallest_that_fits(q, steps, budget):
    sigma = solve_noise_multiplier(
        histories=[], sampling_rate=q, steps=steps, epsilon=budget, delta=1e-4, minimum=0.3
    )
    assert round(sigma * 1000) == pytest.approx(sigma * 1000, abs=1e-9)
    assert epsilon([event(q, sigma, steps)], delta=1e-4) <= budget
    if sigma > 0.3:
        assert epsilon([event(q, sigma - 1e-3, steps)], delta=1e-4) > budget


def test_solving_meets_the_worst_of_several_histories():
    histories = [[event(0.5, 4.0, 10)], [event(0.1, 4.0, 40), event(1, 40.0, 30)], []]
    sigma = solve_noise_multiplier(histories=histories, sampling_rate=0.5, steps=30, epsilon=3, delta=1e-4)
    costs = [epsilon([*history, event(0.5, sigma, 30)], delta=1e-4) for history in histories]
    assert max(costs) <= 3
    less = [epsilon([*history, event(0.5, sigma - 1e-3, 30)], delta=1e-4) for history in histories]
    assert max(less) > 3


def test_solving_asks_the_claim_itself_once_or_twice(monkeypatch):
    asked = []
    monkeypatch.setattr(
        calibration,
        "claimed_epsilon",
        lambda events, *, delta: asked.append(1) or epsilon(events, delta=delta),
    )
    for q, steps, budget in (0.5, 20, 3.0), (0.02, 400, 0.7), (1.0, 30, 8.0), (0.3, 1, 0.05):
        asked.clear()
        sigma = solve_noise_multiplier(
            histories=[], sampling_rate=q, steps=steps, epsilon=budget, delta=1e-3, minimum=0.2
        )
        assert 1 <= len(asked) <= 2
        costs = [epsilon([event(q, tried, steps)], delta=1e-3) for tried in (sigma, sigma - 1e-3)]
        assert costs[0] <= budget < costs[1]


def test_solving_keeps_within_its_bounds():
    ask = dict(histories=[], sampling_rate=0.5, steps=20, epsilon=3, delta=1e-3)
    assert solve_noise_multiplier(**ask, minimum=2.9) == 2.9
    assert solve_noise_multiplier(**ask, minimum=0.3, maximum=2.477) == 2.477
    with pytest.raises(BudgetError):
        solve_noise_multiplier(**ask, minimum=0.3, maximum=2.476)
    with pytest.raises(BudgetError):
        solve_noise_multiplier(**ask | {"histories": [[event(1, 0.0, 1)]]})


def test_solving_behind_a_history_that_has_spent_almost_everything():
    history = [event(0.5, 2.5, 20)]
    budget = epsilon(history, delta=1e-3) * 1.001
    sigma = solve_noise_multiplier(
        histories=[history], sampling_rate=0.5, steps=1, epsilon=budget, delta=1e-3
    )
    costs = [epsilon([*history, event(0.5, tried, 1)], delta=1e-3) for tried in (sigma, sigma - 1e-3)]
    assert costs[0] <= budget < costs[1]


def test_solving_refuses_what_cannot_fit():
    for histories, budget in ([[event(0.5, 1.0, 60)]], 8.0), ([], 1e-4):
        with pytest.raises(BudgetError) as caught:
            solve_noise_multiplier(
                histories=histories, sampling_rate=0.5, steps=60, epsilon=budget, delta=1e-5, maximum=50
            )
        assert caught.value.refusal is RefusalCode.BUDGET
        assert caught.value.why
        assert caught.value.fix


def test_opacus_published_inverse_is_met():
    # Opacus tests: PRV, 2000 steps, q 0.04, epsilon 8, delta 1e-5 -> 1.2915 (bisected to 0.01).
    sigma = solve_noise_multiplier(
        histories=[], sampling_rate=0.04, steps=2000, epsilon=8, delta=1e-5, minimum=1.27, maximum=1.31
    )
    assert sigma == pytest.approx(1.2915, abs=0.005)


def test_affordable_steps_is_the_inverse_of_epsilon():
    for histories in ([], [[event(0.5, 4.0, 10)]]):
        steps = affordable_steps(
            histories=histories, sampling_rate=0.5, noise_multiplier=5.0, epsilon=2.0, delta=1e-4
        )
        past = histories[0] if histories else []
        assert epsilon([*past, event(0.5, 5.0, steps)], delta=1e-4) <= 2.0
        assert epsilon([*past, event(0.5, 5.0, steps + 1)], delta=1e-4) > 2.0
    spent = [[event(0.5, 1.0, 100)]]
    for past, sigma in (spent, 3.0), ([], 0.0):
        assert (
            affordable_steps(
                histories=past, sampling_rate=0.5, noise_multiplier=sigma, epsilon=4.0, delta=1e-4
            )
            == 0
        )
    assert (
        affordable_steps(
            histories=[], sampling_rate=0.5, noise_multiplier=100.0, epsilon=4.0, delta=1e-4, most=17
        )
        == 17
    )


def test_fits_agrees_with_the_claim_at_the_boundary():
    events = [event(0.5, 2.4, 60)]
    claim = epsilon(events, delta=1e-4)
    assert claim < running_epsilon(events, delta=1e-4)
    assert fits(events, epsilon=claim, delta=1e-4)
    assert not fits(events, epsilon=claim - 1e-6, delta=1e-4)


def test_a_wild_plan_neither_hangs_nor_fills_the_memory():
    assert epsilon([event(1, 0.3, 1000)], delta=1e-4) > 5000
