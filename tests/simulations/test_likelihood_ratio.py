"""The likelihood-ratio attack against normals and randomised response, whose rates are known."""

import numpy as np
import pytest
from scipy import stats

from simulations.audits.likelihood_ratio import (
    judge,
    likelihood_ratios,
    lower_limit,
    proven_epsilon,
    true_positive_rate,
)

SHIFT = 3.0


def tosses(models, patients, seed=0):
    return np.random.default_rng(seed).random((models, patients)) < 0.5


def shifted(member, shift, seed=1):
    """Confidences of models that are surer of their members by `shift` standard deviations."""
    rng = np.random.default_rng(seed)
    difficulty = 5 * rng.standard_normal(member.shape[1])
    return difficulty + shift * member + rng.standard_normal(member.shape)


def test_the_ratio_is_that_of_the_two_normal_densities():
    member = tosses(400, 5)
    confidences = shifted(member, SHIFT)
    found = likelihood_ratios(confidences, member, attacked=0, shadows=range(1, 400))
    shadows, inside = confidences[1:], member[1:]
    for patient in range(5):
        seen, there = shadows[:, patient], inside[:, patient]
        expected = stats.norm.logpdf(confidences[0, patient], seen[there].mean(), 1)
        expected -= stats.norm.logpdf(confidences[0, patient], seen[~there].mean(), 1)
        assert found[patient] == pytest.approx(expected, abs=0.5)  # the variances are estimates


def test_a_patient_whom_no_shadow_model_had_is_not_guessed():
    member = np.array([[True, True], [False, True], [False, False]])
    ratios = likelihood_ratios(np.arange(6.0).reshape(3, 2), member, attacked=0, shadows=[1, 2])
    assert ratios[0] == 0
    assert ratios[1] != 0


def test_rates_are_those_of_the_shifted_normals():
    """Source: the ROC curve of two normals, TPR = Phi(shift + Phi^-1(FPR))."""
    member = tosses(32, 300)
    attack = judge(shifted(member, SHIFT), member, delta=1e-10)
    assert attack.true_positives == pytest.approx(stats.norm.cdf(SHIFT + stats.norm.ppf(0.01)), abs=0.06)
    assert attack.auc == pytest.approx(stats.norm.cdf(SHIFT / np.sqrt(2)), abs=0.01)
    assert 0.6 < attack.true_positives_lower < attack.true_positives


def test_guessing_is_not_an_attack():
    member = tosses(20, 100)
    attack = judge(shifted(member, 0.0), member, delta=1e-10)
    assert attack.auc == pytest.approx(0.5, abs=0.05)
    assert attack.epsilon_lower == 0
    assert attack.true_positives_lower < 0.02


def test_the_rate_counts_only_thresholds_that_few_others_exceed():
    member = np.array([[True] * 4 + [False] * 100])
    ratios = np.array([[9.0, 8.0, 6.0, 4.0, 7.0, 5.0, *np.zeros(98)]])
    assert true_positive_rate(ratios, member) == 0.75  # one of 100 others lies above 6, two above 4


def test_the_limit_sees_that_patients_and_models_come_in_clusters():
    """One model that gives everybody away must not count as a hundred independent successes."""
    member = tosses(16, 100)
    ratios = np.random.default_rng(3).standard_normal(member.shape)
    ratios[0, member[0]] += 20
    assert true_positive_rate(ratios, member) > 0.05
    assert lower_limit(ratios, member, seed=0) < 0.03


def test_perfect_guesses_prove_what_randomised_response_allows():
    """Bits flipped with probability 1 / (1 + e^eps) are exactly eps-DP: the bound stays below, and near."""
    member = tosses(16, 2000)
    epsilon = 2.0
    kept = np.random.default_rng(5).random(member.shape) < 1 / (1 + np.exp(-epsilon))
    seen = np.where(kept, member, ~member).astype(np.float64)
    seen += 0.01 * np.random.default_rng(6).standard_normal(member.shape)
    assert 0.8 * epsilon < proven_epsilon(seen, member, delta=1e-10) <= epsilon
