"""Mutants of who enters a step."""

import numpy as np

import client.training.private as training
from tests.audit.mutants import mutant


def with_sampler(patch, change):
    real = training.poisson_sample
    patch.setattr(training, "poisson_sample", lambda units, rate, stream: change(real, units, rate, stream))


@mutant("T9", caught_by="sampling")
def a_random_patient_for_an_empty_batch(patch):
    """A step that nobody enters is given a random patient."""

    def never_empty(real, units, rate, stream):
        drawn = real(units, rate, stream)
        return drawn if len(drawn) or not units else stream.integers(units, 1)

    with_sampler(patch, never_empty)


@mutant("amplification", caught_by="sampling")
def batches_of_fixed_size(patch):
    """Every step draws the same number of patients, accounted as Poisson."""
    with_sampler(
        patch,
        lambda real, units, rate, stream: np.sort(stream.permutation(units)[: max(1, round(rate * units))]),
    )


@mutant("amplification", caught_by="sampling")
def shuffling_sold_as_poisson(patch):
    """Patients are shuffled once and taken in turn, accounted as Poisson."""
    order = []

    def next_ones(real, units, rate, stream):
        wanted = max(1, round(rate * units)) if units else 0
        while len(order) < wanted:
            order.extend(stream.permutation(units).tolist())
        batch, order[:] = order[:wanted], order[wanted:]
        return np.unique([unit for unit in batch if unit < units]).astype(np.int64)

    with_sampler(patch, next_ones)


@mutant("amplification", caught_by="sampling")
def more_patients_enter_than_are_accounted(patch):
    """Steps draw at a tenth above the rate of the plan, as a rate from the wrong n gives."""
    with_sampler(patch, lambda real, units, rate, stream: real(units, min(1.0, 1.1 * rate), stream))
