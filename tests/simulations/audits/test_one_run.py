"""The mathematics of the one-run audit, against published numbers and the binomial interval."""

import numpy as np
import pytest
from scipy import optimize, stats

from simulations.audits.one_run import epsilon_lower_bound, guess, guessing_p_value


@pytest.mark.parametrize(
    ("canaries", "ceiling"), [(100, 3.49), (200, 4.19), (500, 5.11), (1000, 5.81), (2000, 6.50)]
)
def test_all_guesses_right_reach_the_ceiling(canaries, ceiling):
    """Logit of 0.05^(1/m): as much as that many canaries can prove with 95 % confidence."""
    bound = epsilon_lower_bound(
        canaries=canaries, guesses=canaries, right=canaries, delta=1e-12, confidence=0.95
    )
    assert bound == pytest.approx(ceiling, abs=0.005)


def test_the_papers_example():
    """Steinke et al. 2023, arXiv 2305.08846, appendix D: m 1000, 75 of 100 right, delta 1e-4, 95 %: 0.673."""
    numbers = dict(canaries=1000, guesses=100, right=75, delta=1e-4)
    assert epsilon_lower_bound(**numbers, confidence=0.95) == pytest.approx(0.673, abs=5e-4)
    assert guessing_p_value(**numbers, epsilon=0.673) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize(("guesses", "right"), [(50, 40), (400, 311), (800, 792), (10, 3)])
def test_without_delta_it_is_the_binomial_interval(guesses, right):
    """Clopper-Pearson lower limit of the accuracy, as logit."""
    accuracy = stats.beta.ppf(0.05, right, guesses - right + 1)
    expected = max(0.0, np.log(accuracy / (1 - accuracy)))
    bound = epsilon_lower_bound(canaries=1000, guesses=guesses, right=right, delta=0.0, confidence=0.95)
    assert bound == pytest.approx(expected, abs=1e-6)


def slow_p_value(m, r, v, eps, delta):
    """Theorem 5.2 term by term."""
    rate = 1 / (1 + np.exp(-eps))
    pmf = [float(stats.binom.pmf(k, r, rate)) for k in range(r + 1)]
    alpha = max(sum(pmf[v - i : v]) / i for i in range(1, v + 1))
    return min(1.0, sum(pmf[v:]) + 2 * m * delta * alpha)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("guesses", "right"), [(30, 30), (30, 22), (30, 1)])
def test_delta_counts_as_the_theorem_says(guesses, right, epsilon):
    fast = guessing_p_value(canaries=500, guesses=guesses, right=right, epsilon=epsilon, delta=1e-4)
    assert fast == pytest.approx(slow_p_value(500, guesses, right, epsilon, 1e-4), rel=1e-9)


def test_the_bound_is_where_the_chance_is_the_level():
    numbers = dict(canaries=8100, guesses=800, right=600, delta=1e-10)
    root = optimize.brentq(lambda e: slow_p_value(8100, 800, 600, e, 1e-10) - 0.05, 0, 10)
    assert epsilon_lower_bound(**numbers, confidence=0.95) == pytest.approx(root, abs=1e-6)


def test_guesses_that_prove_nothing():
    assert epsilon_lower_bound(canaries=100, guesses=0, right=0, delta=1e-5, confidence=0.95) == 0
    assert epsilon_lower_bound(canaries=100, guesses=100, right=50, delta=1e-5, confidence=0.95) == 0
    assert guessing_p_value(canaries=100, guesses=100, right=0, epsilon=1.0, delta=1e-5) == 1


@pytest.mark.parametrize("wrong", [{"right": 11}, {"guesses": 101}, {"epsilon": -1.0}, {"delta": 2.0}])
def test_impossible_counts_are_refused(wrong):
    numbers = dict(canaries=100, guesses=10, right=5, epsilon=1.0, delta=0.0) | wrong
    with pytest.raises(ValueError, match="needs"):
        guessing_p_value(**numbers)


def test_the_surest_are_guessed():
    scores = np.array([0.3, -2.0, 5.0, 0.1, 4.0, -7.0])
    np.testing.assert_array_equal(guess(scores, guesses=4), [0, -1, 1, 0, 1, -1])
    assert not guess(scores, guesses=0).any()
