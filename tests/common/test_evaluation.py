"""Counts about validation patients: what one patient can change, and the noise that is added."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from common.evaluation import (
    KINDS,
    ROUNDING_VARIANCE,
    CountPlan,
    count_patients,
    noised,
    patient_labels,
    patient_means,
    patient_rows,
)
from common.messages import CONFUSION, SCORES
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from simulations.audits.finding import ALPHA


def vector(counts):
    return np.concatenate([counts[kind] for kind in counts])


def some_people(classes):
    """Every kind of patient that matters: each label, certain, undecided, between bins, broken."""
    certain = [np.eye(classes)[label] for label in range(classes)]
    others = [
        np.full(classes, 1 / classes),
        np.full(classes, np.nan),
        np.linspace(1, 3, classes) / (2 * classes),
    ]
    return [(said, label) for said in (*certain, *others) for label in range(classes)]


def counted(plan, people):
    said = np.array([said for said, _ in people]).reshape(-1, plan.classes)
    return vector(count_patients(plan, said, np.array([label for _, label in people], dtype=np.int64)))


@pytest.mark.parametrize("kinds", [(CONFUSION,), (SCORES,), KINDS])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_no_patient_changes_more_than_the_stated_sensitivity(kinds, classes):
    """All neighbours of all data sets of up to two patients; for a sum over patients that is everybody."""
    plan = CountPlan.of(kinds, classes=classes, score_bins=3)
    people = some_people(classes)
    changes = [
        np.linalg.norm(counted(plan, [*rest, person]) - counted(plan, list(rest)))
        for size in (0, 1)
        for rest in itertools.product(people, repeat=size)
        for person in people
    ]
    assert max(changes) <= plan.l2_sensitivity + 1e-12
    assert max(changes) == pytest.approx(plan.l2_sensitivity)  # stated no larger than it is


@pytest.mark.parametrize(
    ("kinds", "classes", "expected"),
    [((CONFUSION,), 2, 1), ((SCORES,), 2, 1), (KINDS, 2, math.sqrt(2)), ((SCORES,), 5, math.sqrt(5)),
     (KINDS, 5, math.sqrt(6))],
)  # fmt: skip
def test_the_sensitivities_are_those_of_the_module(kinds, classes, expected):
    assert CountPlan.of(kinds, classes=classes, score_bins=10).l2_sensitivity == pytest.approx(expected)


def test_each_patient_is_in_one_cell_of_each_part():
    plan = CountPlan.of(KINDS, classes=2, score_bins=4)
    said = np.array([[0.9, 0.1], [0.3, 0.7], [0.0, 1.0], [0.5, 0.5]])
    counts = count_patients(plan, said, np.array([0, 0, 1, 1]))
    assert counts[CONFUSION] == [1, 1, 1, 1]
    # With the finding: .5 and 1, which belongs to the last bin; without: .1 and .7.
    assert counts[SCORES] == [0, 0, 1, 1, 1, 0, 1, 0]


def test_a_plan_needs_known_kinds():
    for kinds in ((), ("losses",), (CONFUSION, "losses")):
        with pytest.raises(ValueError, match="expected some of"):
            CountPlan.of(kinds, classes=2, score_bins=10)


@pytest.mark.parametrize("randomness", [SecureRandomness(), ReproducibleRandomness(3, "north")])
def test_the_noise_is_gaussian_of_the_stated_size(randomness):
    plan = CountPlan.of(KINDS, classes=2, score_bins=100)
    zeros = {kind: [0.0] * plan.length(kind) for kind in KINDS}
    sigma = 3.0
    draws = [
        vector(noised(plan, zeros, noise_multiplier=sigma, stream=stream))
        for step in range(50)
        for stream in [randomness.stream(purpose="evaluation", round_number=1, step=step)]
    ]
    noise = np.concatenate(draws)
    variance = plan.noise_stddev(sigma) ** 2 + ROUNDING_VARIANCE
    low, high = stats.chi2.ppf([ALPHA / 4, 1 - ALPHA / 4], len(noise))
    assert low < (noise**2).sum() / variance < high
    assert abs(noise.mean()) < stats.norm.isf(ALPHA / 4) * math.sqrt(variance / len(noise))
    # Against the normal's own cells, the tails together.
    edges = np.arange(-12, 13) + 0.5
    expected = np.diff(stats.norm.cdf(edges, scale=plan.noise_stddev(sigma)), prepend=0)
    expected = np.append(expected, 1 - expected.sum())
    observed = np.bincount(np.searchsorted(edges, noise), minlength=len(expected))
    assert stats.chisquare(observed, expected * len(noise)).pvalue > ALPHA
    assert (noise == np.rint(noise)).all()


def test_noise_is_added_to_every_cell_and_never_cut_off():
    plan = CountPlan.of(KINDS, classes=3, score_bins=10)
    counts = {kind: [float(cell) for cell in range(plan.length(kind))] for kind in KINDS}
    stream = ReproducibleRandomness(0, "north").stream(purpose="evaluation", round_number=1, step=0)
    released = noised(plan, counts, noise_multiplier=50.0, stream=stream)
    changed = vector(released) - vector(counts)
    assert (changed != 0).mean() > 0.95
    assert min(vector(released)) < 0
    again = ReproducibleRandomness(0, "north").stream(purpose="evaluation", round_number=1, step=0)
    assert noised(plan, counts, noise_multiplier=50.0, stream=again) == released


def test_a_patient_has_one_mean_and_one_label_whatever_the_number_of_images():
    offsets, rows = np.array([0, 1, 4, 4, 6]), np.array([5, 0, 2, 4, 1, 3])
    chosen, patients = patient_rows(offsets, rows, most=2)
    assert chosen.tolist() == [5, 0, 2, 1, 3]
    assert patients.tolist() == [0, 1, 1, 3, 3]
    said = np.array([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5], [0.1, 0.9], [0.3, 0.7]])
    means = patient_means(said, patients, num_patients=4)
    np.testing.assert_allclose(means[[0, 1, 3]], [[0.2, 0.8], [0.75, 0.25], [0.2, 0.8]])
    assert np.isnan(means[2]).all()


def test_a_patient_with_several_labels_has_the_most_frequent_one_and_in_a_tie_the_higher():
    targets = np.array([0, 0, 1, 0, 1, 2, 2, 0])
    patients = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert patient_labels(targets, patients, num_patients=3, classes=3).tolist() == [0, 1, 2]
