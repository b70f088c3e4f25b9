"""The bounds of the canary audit, on observations drawn without any training: right as often as stated."""

import numpy as np
import pytest
from scipy import stats

from simulations.audits.canary import (
    FULL_BATCH,
    SAMPLED,
    Scores,
    _ratio_of_steps,
    _ratio_of_sum,
    gaussian_epsilon,
    gaussian_lower_bound,
    lower_bound,
)

TIMES = 120


def drawn(claim, rng, *, runs, noise=1.0, summed=False):
    """Scores of a mechanism that adds `noise` times the claimed noise."""
    seen = []
    for there in (True, False):
        steps = noise * claim.noise_multiplier * rng.normal(size=(runs, claim.steps_per_run))
        steps += there * (rng.random(steps.shape) < claim.sampling_rate)
        if claim.sampling_rate == 1:
            seen.append(steps.sum(axis=1))
        else:
            seen.append(_ratio_of_sum(claim, steps.sum(axis=1)) if summed else _ratio_of_steps(claim, steps))
    middle = claim.steps_per_run / 2 if claim.sampling_rate == 1 else 0.0
    return Scores(there=seen[0], away=seen[1], midpoint=middle)


@pytest.mark.parametrize(("mu", "delta", "epsilon"), [(1.0, 1e-5, 4.377178), (0.0, 1e-5, 0.0)])
def test_epsilon_of_the_gaussian_mechanism(mu, delta, epsilon):
    """Balle and Wang 2018, arXiv 1805.06530, theorem 8."""
    assert gaussian_epsilon(mu, delta) == pytest.approx(epsilon, abs=1e-5)


def test_the_claim_of_full_batches_is_that_of_the_gaussian_mechanism():
    mu = np.sqrt(FULL_BATCH.steps_per_run) / FULL_BATCH.noise_multiplier
    assert gaussian_epsilon(mu, FULL_BATCH.delta) == pytest.approx(FULL_BATCH.epsilon(), rel=1e-3)


@pytest.mark.parametrize(
    ("claim", "bound"), [(FULL_BATCH, gaussian_lower_bound), (SAMPLED, lower_bound)], ids=["full", "sampled"]
)
def test_a_95_percent_bound_is_above_the_truth_in_at_most_5_percent_of_audits(claim, bound):
    rng = np.random.default_rng(4)
    truth = claim.epsilon()
    above = sum(bound(claim, drawn(claim, rng, runs=300), confidence=0.95) > truth for _ in range(TIMES))
    assert above <= stats.binom.isf(1e-6, TIMES, 0.05)


@pytest.mark.parametrize("summed", [False, True])
def test_more_noise_lowers_the_bound_and_less_raises_it(summed):
    rng = np.random.default_rng(5)
    bounds = [
        lower_bound(SAMPLED, drawn(SAMPLED, rng, runs=2000, noise=noise, summed=summed), confidence=0.95)
        for noise in (4.0, 1.0, 0.25)
    ]
    assert bounds[0] < bounds[1] < 3.0 < bounds[2]


def test_a_surer_bound_is_lower():
    scores = drawn(FULL_BATCH, np.random.default_rng(6), runs=1000)
    bounds = [gaussian_lower_bound(FULL_BATCH, scores, confidence=c) for c in (0.95, 0.999, 1 - 1e-6)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1]
