"""Sampling audits: every patient on their own with the plan's probability, every step anew."""

import numpy as np
import pytest

import client.training.private
from simulations.audits.sampling import RATE, UNITS, audit_sampling, audit_sampling_black_box

pytestmark = pytest.mark.audit


def white_box():
    return audit_sampling(steps=2000, rounds=400)


def black_box():
    return audit_sampling_black_box(rounds=800, long_rounds=60)


BOTH = pytest.mark.parametrize("audit", [white_box, black_box], ids=["white box", "black box"])


def test_patients_enter_by_poisson_sampling(passes):
    passes(audit_sampling())


def test_updates_show_poisson_sampling(passes):
    finding = audit_sampling_black_box()
    passes(finding)
    assert finding.black_box


# --- an audit that can fail ---


def with_sampler(monkeypatch, sampler):
    monkeypatch.setattr(client.training.private, "poisson_sample", sampler)


@BOTH
def test_the_audit_sees_shuffling(monkeypatch, audit, fails):
    order, rng = [], np.random.default_rng(1)

    def shuffled(num_units, rate, stream):
        size = max(1, int(rate * num_units))
        if len(order) < size:
            order.extend(rng.permutation(num_units))
        batch, order[:] = order[:size], order[size:]
        return np.unique(batch).astype(np.int64) % num_units

    with_sampler(monkeypatch, shuffled)
    fails(audit(), "steps are independent")


def test_the_audit_sees_shuffling_that_begins_anew_each_round(monkeypatch, fails):
    """Black-box: within a round everybody takes part about equally often."""
    left = {}

    def shuffled(num_units, rate, stream):
        size = max(1, int(rate * num_units))
        if len(left.get(num_units, ())) < size:
            left[num_units] = list(stream.permutation(num_units))
        batch, left[num_units] = left[num_units][:size], left[num_units][size:]
        return np.sort(batch).astype(np.int64)

    with_sampler(monkeypatch, shuffled)
    fails(black_box(), "times in 12 steps are binomial")


@BOTH
def test_the_audit_sees_a_fixed_batch_size(monkeypatch, audit, fails):
    rng = np.random.default_rng(1)
    with_sampler(monkeypatch, lambda n, rate, stream: np.sort(rng.choice(n, round(rate * n), replace=False)))
    fails(audit(), "batch sizes are binomial")


@BOTH
def test_the_audit_sees_another_rate_than_the_plans(monkeypatch, audit, fails):
    real = client.training.private.poisson_sample
    with_sampler(monkeypatch, lambda n, rate, stream: real(n, min(1.0, 1.1 * rate), stream))
    fails(audit(), "rate")


@BOTH
def test_the_audit_sees_a_patient_who_is_drawn_more_often(monkeypatch, audit, fails):
    real = client.training.private.poisson_sample

    def favouring(n, rate, stream):
        units = real(n, rate, stream)
        return np.union1d(units, [7]) if n > 7 and stream.uniform(1)[0] < 0.4 else units

    with_sampler(monkeypatch, favouring)
    fails(audit(), "each patient's share")


@BOTH
def test_the_audit_sees_patients_who_enter_together(monkeypatch, audit, fails):
    real = client.training.private.poisson_sample

    def in_couples(n, rate, stream):
        if n < UNITS:
            return real(n, rate, stream)
        halves = real(n // 2, rate, stream)
        return np.sort(np.concatenate([2 * halves, 2 * halves + 1]))

    with_sampler(monkeypatch, in_couples)
    fails(audit(), "patients are independent")


def test_the_audit_sees_an_empty_batch_that_is_filled_up(monkeypatch, fails):
    """Trap T9: {} and {x} then differ by up to 2 C."""
    real = client.training.private.poisson_sample

    def never_empty(n, rate, stream):
        units = real(n, rate, stream)
        return units if len(units) else stream.integers(n, 1)

    with_sampler(monkeypatch, never_empty)
    fails(black_box(), "rate of a patient alone")
    fails(white_box(), "small rate")
    assert RATE < 0.5
