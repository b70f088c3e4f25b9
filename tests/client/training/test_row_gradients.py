"""Norms and sums of row gradients, dense or as factors: right, bounded, and the same in any company."""

import math

import numpy as np
import pytest
import torch

from client.training.row_gradients import (
    DenseRows,
    ProductRows,
    Units,
    squared_norms,
    together,
    weighted_sum,
)
from common.privacy.noise import CLIP_SLACK, LARGEST_COHERENCE, rounding_of_sums

SEGMENTS = [0, 0, 1, 2, 2, 2, 3]
ROWS = 10  # three rows fill the chunk up


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def units_of(segments=SEGMENTS, rows=ROWS):
    return Units.of(torch.tensor(segments), segments[-1] + 1, rows=rows)


def gradients_of(rows, shape, count=ROWS):
    """Gradient of each row, float64 (rows, *shape), by its own sum with factor 1 and nobody else."""
    alone = Units.of(torch.arange(count), count, rows=count)
    found = []
    for row in range(count):
        total = torch.zeros(shape, dtype=torch.float64)
        rows.add_clipped(total, torch.eye(count, dtype=torch.float64)[row], alone, None)
        found.append(total)
    return torch.stack(found)


def dense(seed=0, width=300):
    values = torch.randn(ROWS, width, generator=generator(seed))
    return DenseRows(values.clone()), values.double()


def product(seed=0, positions=4, p=5, d=7, rows=ROWS):
    left = torch.randn(rows, positions, p, generator=generator(seed))
    right = torch.randn(rows, positions, d, generator=generator(seed + 1))
    return ProductRows(left, right), torch.einsum("itp,itd->ipd", left.double(), right.double()).flatten(1)


MAKERS = [dense, product, lambda: product(positions=1)]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("segments", [SEGMENTS, list(range(ROWS)), [0], [0] * ROWS, list(range(7))], ids=str)
def test_norm_and_sum_are_those_of_the_units(make, segments):
    rows, each = make()
    units = units_of(segments)
    of_unit = torch.zeros(ROWS, each.shape[1], dtype=torch.float64)
    of_unit.index_add_(0, torch.tensor(segments), each[: len(segments)])
    used = units.num_units
    norms = rows.squared_norms(units)
    assert norms.dtype == torch.float64
    assert norms.shape == (ROWS,)
    torch.testing.assert_close(
        norms[:used], of_unit.square().sum(1)[:used], rtol=4 * CLIP_SLACK, atol=0, check_dtype=False
    )
    factors = torch.rand(ROWS, generator=generator(3), dtype=torch.float64)
    factors[used:] = 0
    total = torch.full((each.shape[1],), 2.0, dtype=torch.float64)
    rows.add_clipped(total, factors, units, None)
    torch.testing.assert_close(total, 2 + factors @ of_unit, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", MAKERS)
def test_a_unit_has_the_same_norm_whoever_else_has_several_rows(make):
    """A chunk in which all are alone, and one where somebody else has two rows: the others notice nothing."""
    alone = make()[0].squared_norms(units_of([0, 1, 2, 3, 4, 5, 6]))
    company = make()[0].squared_norms(units_of([0, 1, 2, 3, 4, 5, 5]))
    torch.testing.assert_close(company[:5], alone[:5], rtol=1e-13, atol=0)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_broken_unit_touches_nobody_else(make, bad):
    whole, _ = make()
    rows, _ = make()
    for values in vars(rows).values():
        if isinstance(values, torch.Tensor):
            values[1] = bad  # a row of unit 0
    units, broken = units_of(), torch.zeros(ROWS, dtype=torch.bool)
    broken[[0, *range(4, ROWS)]] = True
    norms, expected = rows.squared_norms(units), whole.squared_norms(units)
    assert not norms[0] <= 1e18**2
    assert torch.equal(norms[1:4], expected[1:4])
    factors = torch.where(broken, 0.0, 1.0).double()
    totals = [torch.zeros(300 if make is dense else 35, dtype=torch.float64) for _ in range(2)]
    rows.add_clipped(totals[0], factors, units, broken)
    whole.add_clipped(totals[1], factors, units, broken)
    assert torch.equal(*totals)


def test_several_parameters_at_once_are_as_if_of_one():
    parts = [dense(seed, width)[0] for seed, width in enumerate([3, 130, 1])]
    expected = sum(part.squared_norms(units_of()) for part in parts)
    parts = [dense(seed, width)[0] for seed, width in enumerate([3, 130, 1])]
    joined = together(parts)
    assert joined.width == 134
    torch.testing.assert_close(
        joined.squared_norms(units_of())[:4], expected[:4], rtol=4 * CLIP_SLACK, atol=0
    )


@pytest.mark.parametrize(
    ("segments", "num_units", "rows"),
    [
        ([0, 0, 1], 3, 4),
        ([1, 0, 1], 2, 4),
        ([0, 1, 2], 2, 4),
        ([0, 2, 2], 3, 4),
        ([0, 0], 0, 4),
        ([0, 1], 2, 1),
    ],
)
def test_impossible_units_are_refused(segments, num_units, rows):
    with pytest.raises(ValueError, match="segments"):
        Units.of(torch.tensor(segments), num_units, rows=rows)


def test_rows_that_fill_up_share_a_slot_of_nobody():
    units = units_of()
    assert units.slots.tolist() == [*SEGMENTS, 9, 9, 9]
    assert (units.num_units, units.alone, units.most_rows) == (4, False, 3)
    assert units_of([0, 1, 2]).alone
    full = units_of(list(range(ROWS)))
    assert full.slots.tolist() == list(range(ROWS))


# --- precision ---


@pytest.mark.parametrize("value", [0.1, 1e-3, 3e16, 1e18])
def test_norms_keep_the_promised_share_over_millions_of_weights(value):
    found = squared_norms(torch.full((2, 1_000_003), value)).sqrt()
    expected = float(np.float32(value)) * math.sqrt(1_000_003)
    assert found.tolist() == pytest.approx([expected, expected], rel=CLIP_SLACK)


def test_a_plain_float32_norm_would_be_off_by_much_more():
    """What the blocks are for: equal numbers, and sums of their squares that round the same way each time."""
    worst = {"blocks": 0.0, "plain": 0.0}
    for step in range(40):
        values = torch.full((1, 2**20), 0.1 * 1.01**step)
        exact = float(values[0, 0].double()) * 2**10
        plain = float(torch.linalg.vector_norm(values, dim=1))
        worst["blocks"] = max(worst["blocks"], abs(float(squared_norms(values).sqrt()) / exact - 1))
        worst["plain"] = max(worst["plain"], abs(plain / exact - 1))
    assert worst["blocks"] <= CLIP_SLACK
    assert worst["plain"] > 20 * CLIP_SLACK


def adversarial_squares():
    """Rows of 128 whose float32 sum of squares loses as much as it can: one large number, then small ones."""
    generator = np.random.default_rng(0)
    rows = [np.full(128, value) for value in generator.uniform(0.5, 2, 200)]
    for small in generator.uniform(2.0**-13, 2.0**-10, 300):
        rows.append(np.concatenate([[1.0], np.full(127, small)]))
        rows.append(np.full(128, small) * np.where(np.arange(128) % 16 == 0, 1 / small, 1.0))
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def test_a_norm_is_never_below_the_true_one_by_more_than_its_slack():
    for values in (adversarial_squares(), adversarial_squares().repeat(1, 40)):
        exact = values.double().square().sum(1).sqrt()
        assert ((exact / squared_norms(values).sqrt()) <= 1 + CLIP_SLACK).all()


def cancelling(seed, *, size, apart):
    """Two rows of one unit whose products cancel but for a few last bits of float32."""
    left = size * torch.randn(64, generator=generator(seed))
    right = torch.randn(512, generator=generator(seed + 1000))
    other = right.clone()
    other[:apart] = torch.nextafter(right[:apart], torch.tensor(math.inf))
    return torch.stack([left, -left])[:, None], torch.stack([right, other])[:, None]


def true_norm(left, right):
    total = [[0] * right.shape[-1] for _ in range(1)]
    exact = torch.einsum(
        "itp,itd->pd", left[:1].double(), (right[:1] - right[1:]).double()
    )  # exact difference
    del total
    return float(exact.norm())


@pytest.mark.parametrize("as_positions", [False, True], ids=["two rows", "two positions"])
@pytest.mark.parametrize("size", [1.0, 1e6, 1e12])
@pytest.mark.parametrize("apart", [1, 3, 20])
def test_products_that_cancel_are_clipped_for_what_may_be_left(as_positions, size, apart):
    clip = 0.05
    for seed in range(12):
        left, right = cancelling(seed, size=size, apart=apart)
        true = true_norm(left, right)
        if as_positions:
            rows = ProductRows(left.transpose(0, 1).clone(), right.transpose(0, 1).clone())
            units = Units.of(torch.tensor([0]), 1, rows=1)
        else:
            rows = ProductRows(left, right)
            units = Units.of(torch.tensor([0, 0]), 1, rows=2)
        norm = float(rows.squared_norms(units)[0].sqrt())
        assert norm >= true / (1 + CLIP_SLACK)
        factors = torch.zeros(rows.rows, dtype=torch.float64)
        factors[0] = min(1.0, clip / norm)
        total = torch.zeros(64 * 512, dtype=torch.float64)
        rows.add_clipped(total, factors, units, None)
        assert float(total.norm()) <= clip * (1 + CLIP_SLACK + rounding_of_sums(1))
        # The terms that were added up were not too large either.
        terms = 2 * float(left[0].norm() * right[0].norm()) * float(factors[0])
        assert terms <= LARGEST_COHERENCE * clip * (1 + 1e-6)


def test_without_the_limit_such_norms_would_be_rounding_alone():
    """What the limit is for: float64 itself cannot tell what is left of 1e12 once it has cancelled."""
    ratios = []
    for seed in range(12):
        left, right = (values.double() for values in cancelling(seed, size=1e12, apart=1))
        gram = (left[:, 0] @ left[:, 0].T) * (right[:, 0] @ right[:, 0].T)
        true = true_norm(*cancelling(seed, size=1e12, apart=1))
        ratios.append(math.sqrt(max(float(gram.sum()), 0.0)) / true)
    assert min(ratios) < 0.5


# --- sums in float64 ---


def test_sums_in_another_order_differ_by_less_than_the_noise_was_raised_for():
    units, rows = 300, 1000
    scales = 10.0 ** torch.randint(-6, 6, (units, 1), generator=generator())
    gradients = torch.randn(units, rows, generator=generator(1)) * scales
    factors = (1 / gradients.double().norm(dim=1)).clamp(max=1)
    order = torch.randperm(units, generator=generator(2))
    found = weighted_sum(gradients, factors, into=torch.zeros(rows, dtype=torch.float64))
    again = weighted_sum(gradients[order], factors[order], into=torch.zeros(rows, dtype=torch.float64))
    assert float((found - again).norm()) <= rounding_of_sums(units)
    # Most of that bound is for products; sums of whole gradients are as exact as float64 is.
    assert float((found - again).norm()) <= 1e-13
    chunks = torch.zeros(rows, dtype=torch.float64)
    for start in range(0, units, 7):
        weighted_sum(gradients[start : start + 7], factors[start : start + 7], into=chunks)
    assert float((found - chunks).norm()) <= 1e-13
    # In float32, as matrix products are otherwise, the order shows far above that.
    assert float((factors.float() @ gradients - factors[order].float() @ gradients[order]).norm()) > 1e-7


def test_sums_of_products_in_another_order_too():
    rows, count = product(rows=64)[0], 64
    units = Units.of(torch.arange(count), count, rows=count)
    factors = (1 / rows.squared_norms(units).sqrt()).clamp(max=1)
    order = torch.randperm(count, generator=generator(2))
    other = ProductRows(rows._left[order], rows._right[order])
    totals = [torch.zeros(35, dtype=torch.float64) for _ in range(2)]
    rows.add_clipped(totals[0], factors, units, None)
    other.add_clipped(totals[1], factors[order], units, None)
    assert float((totals[0] - totals[1]).norm()) <= 1e-13 < rounding_of_sums(count)
