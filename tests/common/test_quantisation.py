"""Whole numbers on a public grid: unbiased, exact to add, and read with suspicion."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from scipy import stats

from common.errors import WireError
from common.parameters import l2_norm, to_record
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from common.quantisation import (
    LARGEST,
    MOST,
    Grid,
    bits_of,
    is_quantised,
    levels_from,
    levels_norm,
    quantised,
    round_stochastically,
    rounding_norm,
)

TEMPLATE = {"weight": (30, 11), "bias": (7,), "scale": ()}
WEIGHT = 40


def some_update(seed=0, scale=0.1):
    random = np.random.default_rng(seed)
    return {
        name: np.asarray(scale * random.standard_normal(shape), dtype=np.float32)
        for name, shape in TEMPLATE.items()
    }


def grid_of(bits=8, *exponents):
    return Grid(bits=bits, exponents=exponents or (-5, -6, -3))


def stream(seed=0):
    return ReproducibleRandomness(seed, "a").stream(purpose="rounding", round_number=1, step=0)


def arrays_of(bits=8, *, scale=None, grid=None, weight=WEIGHT):
    update = some_update(scale=scale or {8: 0.1, 4: 0.01}[bits])
    return quantised(update, grid=grid or grid_of(bits), weight=weight, stream=stream())


def read(arrays, bits=8, *, grid=None, weight=WEIGHT):
    return levels_from(to_record(arrays), TEMPLATE, grid=grid or grid_of(bits), weight=weight)


def values_of(levels, grid, weight=WEIGHT):
    """The update that the whole numbers stand for, one number at a time."""
    whole = levels.whole(slice(0, len(levels.fitting))).tolist()
    update, start = {}, 0
    for name, exponent in zip(sorted(TEMPLATE), grid.exponents, strict=True):
        stop = start + math.prod(TEMPLATE[name])
        numbers = [float(Fraction(n) * Fraction(2) ** exponent / weight) for n in whole[start:stop]]
        update[name] = np.array(numbers).reshape(TEMPLATE[name])
        start = stop
    return update


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale", [0.02, 0.1, 0.3, 300.0])
def test_what_travels_is_the_update_to_within_a_spacing(bits, scale):
    """Also where many numbers do not fit, and where so many do not that all travel in 32 bits."""
    grid = grid_of(bits)
    arrays = arrays_of(bits, scale=scale)
    received = values_of(read(load(save(arrays)), bits), grid)
    for name, exponent in zip(sorted(TEMPLATE), grid.exponents, strict=True):
        error = np.abs(received[name] - some_update(scale=scale)[name])
        assert (error * WEIGHT < 2.0**exponent).all()
    assert is_quantised(arrays)
    assert not is_quantised(some_update())


def test_the_forms_are_what_the_bits_say():
    count = sum(math.prod(shape) for shape in TEMPLATE.values())
    assert (arrays_of(8)["levels"].dtype, arrays_of(8)["levels"].nbytes) == (np.int8, count)
    assert (arrays_of(4)["levels"].dtype, arrays_of(4)["levels"].nbytes) == (np.uint8, -(-count // 2))
    assert arrays_of(8, scale=300.0)["levels"].dtype == np.int32
    assert [bits_of(8, 4095), bits_of(8, 4096), bits_of(4, 10**6), bits_of(32, 10**6)] == [32, 8, 4, 32]


def test_rounding_is_unbiased_and_takes_the_two_neighbours():
    values = np.array([-2.75, -0.5, 0.0, 1e-3, 0.25, 3.0, 100.9])
    draws = 200_000
    uniform = SecureRandomness().stream(purpose="rounding", round_number=1, step=0).uniform
    sums = np.zeros(len(values))
    for _ in range(100):
        rounded = round_stochastically(np.tile(values, draws // 100), uniform(len(values) * draws // 100))
        rounded = rounded.reshape(-1, len(values))
        assert ((rounded == np.floor(values)) | (rounded == np.floor(values) + 1)).all()
        sums += rounded.sum(axis=0)
    share = values - np.floor(values)
    up = sums - draws * np.floor(values)
    for count, p in zip(up, share, strict=True):
        assert stats.binomtest(int(count), draws, float(p)).pvalue > 1e-6


def test_the_mean_over_many_hospitals_is_the_mean_of_their_updates():
    """Rounding errors of independent hospitals average out: the mean is off by a tenth of a spacing."""
    grid, total = grid_of(4, 0, 0, 0), None
    for seed in range(400):
        arrays = quantised(some_update(), grid=grid, weight=10, stream=stream(seed))
        whole = read(arrays, 4, grid=grid, weight=10).whole(slice(0, 338))
        total = whole if total is None else total + whole
    exact = np.concatenate([some_update()[name].ravel() for name in sorted(TEMPLATE)])
    assert np.abs(total / 400 - 10 * exact).max() < 0.13  # 5 standard deviations of at most 0.5 / 20


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([8, 4]), st.floats(1e-3, 1e4))
def test_sums_are_the_same_in_any_order(seed, bits, scale):
    grid = grid_of(bits)
    updates = [
        read(
            quantised(some_update(k, scale), grid=grid, weight=k + 1, stream=stream(seed)), bits, weight=k + 1
        )
        for k in range(4)
    ]
    whole = [update.whole(slice(0, 338)) for update in updates]
    assert (sum(whole) == sum(reversed(whole))).all()


def test_saturation_ends_at_the_largest_whole_number():
    grid = grid_of(8, -100, -100, -100)
    levels = read(arrays_of(grid=grid), grid=grid)
    whole = levels.whole(slice(0, 338))
    signs = np.sign(np.concatenate([some_update()[name].ravel() for name in sorted(TEMPLATE)]))
    assert (whole == MOST * signs.astype(np.int64)).all()


@pytest.mark.parametrize("scale", [0.1, 300.0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_by_the_reader(value, scale):
    update = some_update(scale=scale)
    update["weight"][3, 4] = value
    arrays = quantised(update, grid=grid_of(), weight=WEIGHT, stream=stream())
    with pytest.raises(WireError, match="not finite"):
        read(arrays)


def test_rounding_draws_from_its_own_stream_and_can_be_derived():
    first, again = arrays_of(), arrays_of()
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in again.items()}
    secure = SecureRandomness().stream(purpose="rounding", round_number=1, step=0)
    other = quantised(some_update(), grid=grid_of(), weight=WEIGHT, stream=secure)
    assert other["levels"].tobytes() != first["levels"].tobytes()


def test_norms_are_those_of_the_numbers():
    grid, levels = grid_of(4), read(arrays_of(4), 4)
    norm = levels_norm(levels, TEMPLATE, grid=grid, weight=WEIGHT)
    assert norm == pytest.approx(math.sqrt(sum((a**2).sum() for a in values_of(levels, grid).values())))
    assert abs(norm - l2_norm(some_update(scale=0.01))) <= rounding_norm(TEMPLATE, grid=grid, weight=WEIGHT)


@pytest.mark.parametrize(
    ("bits", "exponents"), [(16, (0,)), (8, (101,)), (8, (-101,)), (8, (0.5,)), (8, (math.nan,))]
)
def test_an_impossible_grid_is_refused(bits, exponents):
    with pytest.raises(ValueError, match="bits and exponents"):
        Grid(bits=bits, exponents=exponents)


# --- what arrives is not believed ---


def changed(bits=8, scale=None, **arrays):
    def make():
        return arrays_of(bits, scale=scale) | arrays

    return bits, make


def with_levels(position, value, bits=8):
    def make():
        arrays = arrays_of(bits)
        arrays["levels"] = arrays["levels"].copy()
        arrays["levels"][position] = value
        return arrays

    return bits, make


def beside(places, rest, *, at=127):
    def make():
        arrays = arrays_of()
        levels = arrays["levels"].copy()
        for place in places:
            if place < len(levels):
                levels[place] = at
        return arrays | {
            "levels": levels,
            "places": np.array(places, np.uint32),
            "rest": np.array(rest, np.int32),
        }

    return 8, make


BAD = {
    "other spacing": changed(exponents=np.array([-5, -6, -4], np.int16)),
    "spacings missing": changed(exponents=np.array([-5, -6], np.int16)),
    "spacings as floats": changed(exponents=np.array([-5, -6, -3], np.float32)),
    "other weight": changed(weight=np.array([WEIGHT + 1], np.int64)),
    "other type": changed(levels=np.zeros(338, np.int16)),
    "float levels": changed(levels=np.zeros(338, np.float32)),
    "eight bits for four": changed(4, levels=np.zeros(338, np.int8)),
    "four bits for eight": changed(levels=np.zeros(169, np.uint8)),
    "one number less": changed(levels=np.zeros(337, np.int8)),
    "one number more": changed(levels=np.zeros(339, np.int8)),
    "one more in 32 bits": changed(levels=np.zeros(339, np.int32)),
    "in parameters": changed(levels=np.zeros((30, 11), np.int8)),
    "below the range": with_levels(5, -128),
    "below the range in four bits": with_levels(5, 0x88, bits=4),
    "below the range in 32 bits": changed(scale=300.0, levels=np.full(338, -(2**31), np.int32)),
    "another name": changed(more=np.zeros(1, np.int8)),
    "place beyond the model": beside([338], [1]),
    "place twice": beside([3, 3], [1, 1]),
    "places out of order": beside([4, 3], [1, 1]),
    "nothing missing": beside([3], [0]),
    "of the other sign": beside([3], [-1]),
    "would fit": beside([3], [1], at=5),
    "more than the most": beside([3], [2**31 - 1]),
    "not a number": beside([3], [-(2**31)], at=-127),
    "too many beside": beside(list(range(43)), [1] * 43),
    "rest of other length": changed(rest=np.zeros(3, np.int32)),
    "32 bits and numbers beside": changed(
        levels=np.zeros(338, np.int32), places=np.zeros(1, np.uint32), rest=np.ones(1, np.int32)
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_malformed_update_is_refused(kind):
    bits, make = BAD[kind]
    with pytest.raises(WireError):
        read(make(), bits)


def test_the_last_half_byte_of_an_odd_count_is_zero():
    template = {"w": (3,)}
    grid = Grid(bits=4, exponents=(0,))
    update = {"w": np.array([1, -2, 3], np.float32)}
    arrays = quantised(update, grid=grid, weight=1, stream=stream())
    assert levels_from(to_record(arrays), template, grid=grid, weight=1).fitting.tolist() == [1, -2, 3]
    arrays["levels"] = arrays["levels"] | np.array([0, 0x10], np.uint8)
    with pytest.raises(WireError, match="more numbers"):
        levels_from(to_record(arrays), template, grid=grid, weight=1)


def record_of(content):
    return ArrayRecord({"parameters": Array("uint8", (len(content),), "safetensors", content)})


@pytest.mark.parametrize("cut", [0, 7, 20, 100, -1])
def test_bytes_that_are_cut_or_too_many_are_refused_before_decoding(cut):
    content = save(arrays_of())
    for bad in (content[:cut], content + b"\0", content + bytes(10**6)):
        with pytest.raises(WireError):
            levels_from(record_of(bad), TEMPLATE, grid=grid_of(), weight=WEIGHT)


@pytest.mark.parametrize("shape", [None, [], [2**70], [-1], [1.0], [1, 1], "x"])
def test_a_header_that_lies_about_the_places_is_refused(shape):
    content = save(arrays_of())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["places"]["shape"] = shape
    text = json.dumps(header).encode()
    lying = len(text).to_bytes(8, "little") + text + content[8 + length :]
    with pytest.raises(WireError):
        levels_from(record_of(lying), TEMPLATE, grid=grid_of(), weight=WEIGHT)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_byte_is_refused_or_stays_within_the_grid(data):
    content = bytearray(save(arrays_of()))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        levels = levels_from(record_of(bytes(content)), TEMPLATE, grid=grid_of(), weight=WEIGHT)
    except WireError:
        return
    assert np.abs(levels.fitting).max() <= LARGEST[8]
    assert np.abs(levels.whole(slice(0, 338))).max() <= MOST
