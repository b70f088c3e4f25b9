"""Audit H: who enters a step. Every patient on their own with the plan's probability, in every step anew.

Seen through `train_privately`: a target names its row, and the task notes whose loss is asked for. Shuffled
batches that are accounted as Poisson samples are the field's most frequent false claim.
Source: Beltran et al., Towards Efficient and Scalable Training of DP Deep Learning, arXiv 2406.17298.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import client.private_training
from client.private_training import train_privately
from common.config import TrainingConfig
from common.examples import Examples
from common.preprocessing import Preprocessing
from common.tasks import Classification
from tests.audit.released_steps import ALPHA, NotedSteps
from tests.client.dp_oracle import make_plan

pytestmark = pytest.mark.audit

SIDE, CAP = 4, 2
LENGTHS = (1, 5, 2, 1, 3) * 8
"""Images of each patient; at most CAP of them enter a step."""
UNITS = len(LENGTHS)
UNIT_OF_ROW = np.repeat(np.arange(UNITS), LENGTHS)
RATE = 0.3


class NotingTask(Classification):
    """Targets are 2 * row + label; notes the rows of every step."""

    def losses(self, outputs, targets):
        if outputs.requires_grad:  # the guard's probe does not
            ENTERED[-1].append((targets // 2).numpy().copy())
        return super().losses(outputs, targets % 2)


ENTERED: list[list[np.ndarray]] = []


class Noting(NotedSteps):
    """Opens a new list of rows when a step begins."""

    def stream(self, *, purpose, round_number, step):
        if purpose == "sampling":
            ENTERED.append([])
        return super().stream(purpose=purpose, round_number=round_number, step=step)


def entered(*, steps, rounds=1, rate=RATE, physical_batch_size=256):
    """bool (steps * rounds, rows): which rows entered which step."""
    ENTERED.clear()
    images = np.random.default_rng(0).integers(0, 256, (len(UNIT_OF_ROW), 1, SIDE, SIDE), dtype=np.uint8)
    examples = Examples(
        inputs={"image": images},
        targets=2 * np.arange(len(UNIT_OF_ROW)) + UNIT_OF_ROW % 2,
        units=UNIT_OF_ROW,
        unit_ids=tuple(str(number) for number in range(UNITS)),
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 2))
    for number in range(1, rounds + 1):
        train_privately(
            model=model,
            task=NotingTask(classes=("negative", "positive")),
            examples=examples,
            preprocessing=Preprocessing(image_size=SIDE, channels=1),
            plan=make_plan(sampling_rate=rate, steps=steps, enrolled_units=UNITS, max_rows_per_unit=CAP),
            training=TrainingConfig(learning_rate=1e-3, physical_batch_size=physical_batch_size),
            round_number=number,
            num_rounds=rounds,
            randomness=Noting(),
            device=torch.device("cpu"),
        )
    assert len(ENTERED) == steps * rounds
    rows = np.zeros((steps * rounds, len(UNIT_OF_ROW)), dtype=np.int64)
    for step, parts in enumerate(ENTERED):
        for part in parts:
            np.add.at(rows[step], part, 1)
    assert rows.max() == 1, "a row enters a step at most once"
    return rows.astype(bool)


def units_of(rows):
    """bool (steps, units)."""
    return np.stack([rows[:, unit == UNIT_OF_ROW].any(axis=1) for unit in range(UNITS)], axis=1)


def findings(units, rate):
    """p-values of what Poisson sampling with `rate` promises about bool (steps, units)."""
    steps, count = units.shape
    each = steps * rate * (1 - rate)
    per_unit = float(np.sum((units.sum(axis=0) - steps * rate) ** 2) / each)
    sizes = units.sum(axis=1)
    centred = (units - rate) / np.sqrt(rate * (1 - rate))
    pairs = centred.T @ centred / np.sqrt(steps)
    pairs = pairs[np.triu_indices(count, 1)]
    overlaps = [float(np.sum(centred[:-lag] * centred[lag:])) for lag in range(1, 11)]
    scale = [np.sqrt((steps - lag) * count) for lag in range(1, 11)]
    return {
        "total": float(stats.binomtest(int(units.sum()), units.size, rate).pvalue),
        "each patient's share": 2 * min(stats.chi2.sf(per_unit, count), stats.chi2.cdf(per_unit, count)),
        "batch sizes are binomial": _fit(sizes, count, rate),
        "patients are independent": _two_sided(
            (np.sum(pairs**2) - len(pairs)) / np.sqrt(_variance_of_squares(steps, count, rate))
        ),
        "steps are independent": min(1.0, 10 * min(map(_two_sided, np.divide(overlaps, scale)))),
    }


def _variance_of_squares(steps, count, rate):
    """Variance of the sum over pairs of squared correlations, times steps, of independent patients.

    Pairs that share a patient are not independent, which matters for small rates.
    """
    fourth = (1 - 3 * rate * (1 - rate)) / (rate * (1 - rate))  # of a centred inclusion over its deviation
    number = count * (count - 1) / 2
    alone = (3 * (steps - 1) + fourth**2) / steps - 1
    return number * (alone + 2 * (count - 2) * (fourth - 1) / steps)


def _two_sided(z):
    return float(2 * stats.norm.sf(abs(z)))


def _fit(sizes, count, rate):
    """Chi-square of the batch sizes against the binomial distribution, rare sizes taken together."""
    low, high = stats.binom.ppf([0.02, 0.98], count, rate).astype(int)
    observed = np.bincount(np.clip(sizes, low, high), minlength=high + 1)[low:]
    middle = stats.binom.pmf(np.arange(low + 1, high), count, rate)
    expected = [stats.binom.cdf(low, count, rate), *middle, stats.binom.sf(high - 1, count, rate)]
    return float(stats.chisquare(observed, len(sizes) * np.array(expected)).pvalue)


@pytest.fixture(scope="module")
def rows():
    return entered(steps=6000)


def test_patients_enter_by_poisson_sampling(rows, found):
    for what, p_value in findings(units_of(rows), RATE).items():
        found(f"p, {what}", p_value)
        assert p_value > ALPHA, what


def test_also_from_round_to_round_and_in_chunks(found):
    p_values = findings(units_of(entered(steps=1, rounds=1500, physical_batch_size=3)), RATE)
    found("smallest p", min(p_values.values()))
    assert min(p_values.values()) > ALPHA


def test_a_small_rate_leaves_steps_empty(found):
    units = units_of(entered(steps=4000, rate=0.02))
    p_values = findings(units, 0.02)
    found("empty steps", np.mean(~units.any(axis=1)))
    found("smallest p", min(p_values.values()))
    assert min(p_values.values()) > ALPHA
    assert stats.binomtest(int(np.sum(~units.any(axis=1))), 4000, 0.98**UNITS).pvalue > ALPHA


def test_of_many_images_any_few_enter_and_others_each_time(rows, found):
    p_values = []
    for unit, length in enumerate(LENGTHS):
        mine = rows[:, unit == UNIT_OF_ROW]
        mine = mine[mine.any(axis=1)]
        assert (mine.sum(axis=1) == min(length, CAP)).all()
        if length > CAP:
            pairs = np.stack([np.flatnonzero(row) for row in mine])
            counts = np.zeros((length, length))
            np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
            p_values.append(stats.chisquare(counts[np.triu_indices(length, 1)]).pvalue)
            centred = mine - CAP / length
            variance = CAP / length * (1 - CAP / length) * length
            z = np.sum(centred[:-1] * centred[1:]) / (variance / np.sqrt(length - 1)) / np.sqrt(len(mine) - 1)
            p_values.append(_two_sided(z))
    found("comparisons", len(p_values))
    found("smallest p", min(p_values))
    assert min(p_values) > ALPHA / len(p_values)


# --- an audit that can fail ---


def with_sampler(monkeypatch, sampler):
    monkeypatch.setattr(client.private_training, "poisson_sample", sampler)


def test_the_audit_sees_shuffling(monkeypatch):
    order, rng = [], np.random.default_rng(1)
    size = int(RATE * UNITS)

    def shuffled(num_units, rate, stream):
        if len(order) < size:
            order.extend(rng.permutation(num_units))
        batch, order[:] = order[:size], order[size:]
        return np.unique(batch).astype(np.int64)

    with_sampler(monkeypatch, shuffled)
    p_values = findings(units_of(entered(steps=500)), RATE)
    assert p_values["batch sizes are binomial"] < ALPHA
    assert p_values["steps are independent"] < ALPHA


def test_the_audit_sees_a_fixed_batch_size(monkeypatch):
    rng = np.random.default_rng(1)
    with_sampler(monkeypatch, lambda n, rate, stream: np.sort(rng.choice(n, int(rate * n), replace=False)))
    assert findings(units_of(entered(steps=500)), RATE)["batch sizes are binomial"] < ALPHA


def test_the_audit_sees_another_rate_than_the_plans(monkeypatch):
    real = client.private_training.poisson_sample
    with_sampler(monkeypatch, lambda n, rate, stream: real(n, 1.05 * rate, stream))
    assert findings(units_of(entered(steps=2000)), RATE)["total"] < ALPHA


def test_the_audit_sees_a_patient_who_is_drawn_more_often(monkeypatch):
    real = client.private_training.poisson_sample

    def favouring(n, rate, stream):
        units = real(n, rate, stream)
        return np.union1d(units, [7]) if stream.uniform(1)[0] < 0.2 else units

    with_sampler(monkeypatch, favouring)
    assert findings(units_of(entered(steps=2000)), RATE)["each patient's share"] < ALPHA


def test_the_audit_sees_patients_who_enter_together(monkeypatch):
    real = client.private_training.poisson_sample

    def in_couples(n, rate, stream):
        halves = real(n // 2, rate, stream)
        return np.sort(np.concatenate([2 * halves, 2 * halves + 1]))

    with_sampler(monkeypatch, in_couples)
    assert findings(units_of(entered(steps=500)), RATE)["patients are independent"] < ALPHA
