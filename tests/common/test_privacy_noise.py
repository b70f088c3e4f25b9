"""Noise on the grid: the right distribution in each window, whole numbers only, the cost of rounding paid."""

import math
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import stats

from common.errors import GuardError
from common.privacy import noise, randomness
from common.privacy.noise import CLIP_SLACK, NoiseGrid, integer_noise, most_sampled, rounding_of_sums
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness, polar_normals

ALPHA = 1e-6
PLANS = [(1.0, 1.0, 20_000), (0.7, 500.0, 25_000_000), (100.0, 0.3, 130), (1e-3, 1000.0, 11_000_000)]
"""Clip, noise multiplier, parameters."""


def make_plan(clip=1.0, sigma=1.0, **changes):
    numbers = dict(sampling_rate=0.5, steps=1, enrolled_units=1000, max_rows_per_unit=4, unit="patient")
    return PrivacyPlan(**numbers | changes, l2_clip_norm=clip, noise_multiplier=sigma)


def grid_of(clip, sigma, parameters):
    return NoiseGrid.of(make_plan(clip, sigma), num_parameters=parameters)


@pytest.fixture(params=PLANS, ids=str)
def numbers(request):
    return request.param


def test_the_grid_is_public_and_rounding_is_paid_for(numbers):
    clip, sigma, parameters = numbers
    grid = grid_of(*numbers)
    assert math.frexp(grid.spacing)[0] == 0.5  # a power of two
    # Worst case: every coordinate of the sum is half a spacing off in one world, the other way in the other.
    rounded = grid.spacing * math.sqrt(parameters) / clip
    sums = 2 * rounding_of_sums(most_sampled(make_plan(clip, sigma)))
    assert clip * 2.0**-32 < grid.spacing <= clip * 2.0**-31
    assert grid.noise_stddev / (sigma * clip) - 1 == pytest.approx(CLIP_SLACK + sums + rounded, rel=1e-6)
    # The fill changes the variance by less than it takes to be seen, and is wide enough to be of use.
    width = grid.fill * grid.spacing / grid.noise_stddev
    assert 2.0**-9 < width <= 2.0**-8
    assert width**2 / 12 < 1.3e-6


@pytest.mark.parametrize(("expected", "most"), [(1, 2e-5), (128, 2e-5), (1000, 7e-5), (10_000, 1.1e-3)])
def test_what_rounding_costs_is_little(expected, most):
    """What the module states, for a network of 25 million numbers."""
    plan = make_plan(sampling_rate=0.1, enrolled_units=10 * expected)
    grid = NoiseGrid.of(plan, num_parameters=25_000_000)
    assert 1 + CLIP_SLACK < grid.noise_stddev / plan.noise_stddev < 1 + most


@pytest.mark.parametrize("expected", [0.5, 10, 500, 10_000])
def test_more_units_than_rounding_is_paid_for_do_not_come(expected):
    plan = make_plan(sampling_rate=1e-3, enrolled_units=int(1000 * expected))
    assert most_sampled(plan) >= 4 * expected + 1000
    assert stats.binom.logsf(most_sampled(plan), 1000 * expected, 1e-3) < -100 * math.log(10)


def test_rounding_of_sums_is_that_of_the_book():
    """Higham, section 4.2: off by (m - 1) unit roundoffs of all absolute values together, at most."""
    rng = np.random.default_rng(0)
    units, terms = 40, 50
    values = rng.standard_normal((units, terms)) * 2048 / terms
    exact = math.fsum(values.ravel())
    total = 0.0
    for unit in values:
        total += float(np.cumsum(unit)[-1])
    assert abs(total - exact) <= rounding_of_sums(units)
    assert rounding_of_sums(2 * units) > 2 * rounding_of_sums(units)


@pytest.mark.parametrize(
    "changes", [{"enrolled_units": 3 * 10**6}, {"sigma": 2.2e5}, {"sigma": 1e12}], ids=str
)
def test_what_float64_does_not_hold_exactly_is_refused(changes):
    with pytest.raises(GuardError, match="whole numbers that float64 holds"):
        NoiseGrid.of(make_plan(**changes), num_parameters=25_000_000)


def test_a_million_patients_and_large_noise_fit():
    for clip, parameters in ((0.75, 25_000_000), (1.99, 2**24), (100.0, 1)):
        for sigma in (1000.0, 3e4):
            plan = make_plan(clip, sigma, enrolled_units=10**6)
            grid = NoiseGrid.of(plan, num_parameters=parameters)
            # The largest noise with its fill, and a million patients who all point the same way.
            largest = math.sqrt(128 * math.log(2)) * grid.noise_stddev / grid.spacing + grid.fill
            assert largest + 10**6 * clip / grid.spacing < 2**53


@pytest.mark.parametrize("source", [SecureRandomness(), ReproducibleRandomness(1, "here")])
def test_noise_is_normal_whole_and_calibrated(source):
    grid = grid_of(0.7, 1.3, 20_000)
    stream = source.stream(purpose="noise", round_number=1, step=0)
    noise = integer_noise(300_001, grid=grid, stream=stream)
    assert noise.dtype == np.int64
    values = noise * grid.spacing / (0.7 * 1.3)
    count = len(values)
    assert stats.kstest(values, "norm").pvalue > ALPHA
    squares = (values**2).sum()
    assert 2 * min(stats.chi2.cdf(squares, count), stats.chi2.sf(squares, count)) > ALPHA
    assert abs((values**4).mean() - 3) < stats.norm.isf(ALPHA / 2) * np.sqrt(96 / count)
    for lag in (1, 1 << 14):
        assert abs((values[lag:] * values[:-lag]).mean()) < stats.norm.isf(ALPHA / 2) / np.sqrt(count - lag)
    # The lowest bits are as good as any: no grid within the grid.
    assert stats.chisquare(np.bincount(noise & 15, minlength=16)).pvalue > ALPHA
    assert len(np.unique(noise)) > 0.99 * count


class Words:
    """Hands out given normals, and a fill that is all zeros."""

    def __init__(self, normals):
        self.normals = normals

    def fill_normal(self, into, stddev=1.0):
        into[:] = self.normals[: len(into)] * stddev

    def fill_integers(self, high, into):
        into[:] = high // 2


def test_each_normal_is_rounded_to_the_nearest_grid_point():
    grid = grid_of(1.0, 1.0, 10_000)
    normals = np.array([0.0, 1.0, -1.0, 9.1, -9.1, 1e-12])
    found = integer_noise(6, grid=grid, stream=Words(normals))
    exact = [round(z * grid.noise_stddev / grid.spacing) for z in normals.tolist()]
    assert found.tolist() == exact
    noise.release(None, into=(whole := np.zeros(6)), grid=grid, stream=Words(normals), divisor=grid.spacing)
    assert whole.tolist() == exact


def stream_of(part, source=None):
    source = source or ReproducibleRandomness(2, "here")
    return source.stream(purpose="noise", round_number=1, step=0, part=part)


def released(summed, count, *, grid, stream, divisor=96.5):
    into = np.full(count, np.nan, dtype=np.float32)
    noise.release(summed, into=into, grid=grid, stream=stream, divisor=divisor)
    return into


@pytest.mark.parametrize("count", [0, 1, 2, 7, noise._BLOCK - 1, noise._BLOCK, 2 * noise._BLOCK + 3])
def test_a_release_is_the_rounded_sum_plus_the_noise_bit_by_bit(count, numbers):
    """Against whole numbers of 64 bits, divided in float64 and rounded to float32 once."""
    grid = grid_of(*numbers)
    summed = np.random.default_rng(count).standard_normal(count) * 3 * numbers[0]
    drawn = integer_noise(count, grid=grid, stream=stream_of(count))
    for given in (summed, None):
        points = 0 if given is None else np.round(summed / grid.spacing).astype(np.int64)
        exact = ((points + drawn).astype(np.float64) * (grid.spacing / 96.5)).astype(np.float32)
        found = released(given, count, grid=grid, stream=stream_of(count))
        assert found.tobytes() == exact.tobytes()
    assert count < 9 or len(np.unique(drawn)) > 0.9 * count


@pytest.mark.parametrize(
    "points", [2**52, -(2**52), 2**52 - 1, 2**40 + 1, 3 * 2**60 + 2**10, -(2**100)], ids=str
)
def test_huge_sums_are_added_as_whole_numbers_and_rounded_once(points):
    """Up to 2**52 nothing is lost; what no plan allows is rounded as a whole, not wrapped around."""
    grid = grid_of(1.0, 3.0, 1000)
    drawn = integer_noise(500, grid=grid, stream=stream_of(0))
    exact = [np.float32(float(points + k) * (grid.spacing / 0.75)) for k in drawn.tolist()]
    summed = np.full(500, points * grid.spacing)
    assert released(summed, 500, grid=grid, stream=stream_of(0), divisor=0.75).tolist() == exact
    if abs(points) <= 2**52:
        assert (points * grid.spacing / grid.spacing + drawn - points == drawn).all()


def test_the_sum_is_rounded_to_the_nearest_grid_point_and_no_zero_has_a_sign():
    grid = grid_of(1.0, 1.0, 10_000)
    points = np.array([0.0, -0.0, 0.4, -0.4, 0.6, -0.6, 1e6 + 0.4, -1e6 - 0.6])
    silent = Words(np.full(8, -1e-15))  # rounds to -0
    found = released(points * grid.spacing, 8, grid=grid, stream=silent, divisor=grid.spacing)
    assert found.tolist() == [0, 0, 0, 0, 1, -1, 1e6, -1e6 - 1]
    assert not np.signbit(found[:4]).any()
    assert not np.signbit(released(None, 8, grid=grid, stream=silent)).any()
    with pytest.raises(ValueError, match="cannot be released"):
        released(np.zeros(4), 5, grid=grid, stream=silent)


@pytest.mark.parametrize("source", [SecureRandomness(), ReproducibleRandomness(1, "here")])
def test_threads_at_once_release_what_one_after_the_other_does(monkeypatch, source):
    grid = grid_of(1.0, 2.0, 1000)
    lengths = [3 * noise._BLOCK + 5, 17, noise._BLOCK, 70_001] * 4
    sums = [np.random.default_rng(number).standard_normal(length) for number, length in enumerate(lengths)]

    def all_of(threads):
        keys = iter(range(1000))
        monkeypatch.setattr(randomness.os, "urandom", lambda size: bytes([next(keys)] * size))
        streams = [stream_of(number, source) for number in range(len(sums))]
        with ThreadPoolExecutor(threads) as pool:
            running = [
                pool.submit(released, summed, len(summed), grid=grid, stream=stream)
                for summed, stream in zip(sums, streams, strict=True)
            ]
            return [done.result().tobytes() for done in running]

    alone = all_of(1)
    assert len(set(alone)) == len(sums)
    assert all_of(4) == alone


@pytest.mark.parametrize("sigma", [1.0, 1000.0])  # the fill in halves of words and in words
def test_a_release_takes_no_memory_of_its_own(sigma):
    grid, count = grid_of(1.0, sigma, 1000), 8 * noise._BLOCK
    summed, stream = np.ones(count), stream_of(0, SecureRandomness())
    into = released(summed, count, grid=grid, stream=stream)
    tracemalloc.start()
    try:
        noise.release(summed, into=into, grid=grid, stream=stream, divisor=2.0)
        assert tracemalloc.get_traced_memory()[1] < 4 * noise._BLOCK
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sigma", [1.0, 1000.0])
def test_every_number_takes_as_many_words(sigma):
    """None is drawn again: neither the cipher nor the clock tells what was drawn."""
    counts = []
    words = type(stream_of(0, SecureRandomness()))._words

    class Watched(type(stream_of(0, SecureRandomness()))):
        def _words(self, count, into=None):
            counts.append(count)
            return words(self, count, into)

    for count in (1000, 1000, 2 * noise._BLOCK):
        counts.clear()
        released(None, count, grid=grid_of(1.0, sigma, 1000), stream=Watched())
        assert sum(counts) == count + (count // 2 if sigma == 1.0 else count)


def radii_below(z, angles, which, stddev=1.0):
    """For each angle: how many of the 2**63 radii give at most z < 0, by bisection of the sampler itself."""
    low = np.zeros(len(angles), dtype=np.uint64)
    high = np.full(len(angles), 2**63, dtype=np.uint64)
    for _ in range(64):
        middle = (low + high) // np.uint64(2)
        below = (polar_normals(middle.copy(), angles.copy(), stddev)[which] <= z) & (low < high)
        low, high = np.where(below, middle + np.uint64(1), low), np.where(below, high, middle)
    return low


def equally_spaced(count):
    """Angles that are nowhere special; the share of radii is a smooth function of them, periodic."""
    return (np.arange(count, dtype=np.uint64) * np.uint64(2**64 // count)) + np.uint64(2**64 // count // 3)


@pytest.mark.parametrize("which", [0, 1], ids=["cosine", "sine"])
@pytest.mark.parametrize("sigmas", [0.01, 0.5, 1, 2, 3, 4, 5, 6, 6.5, 7])
def test_every_window_of_the_fill_has_its_probability(sigmas, which):
    """The claim of the module, counted word by word: right to 1e-5 up to 7 sigma, no hole anywhere."""
    from mpmath import mp, ncdf

    mp.dps = 50
    angles = equally_spaced(512 if sigmas > 1 else 8192)
    worst = 0.0
    for clip, sigma, parameters in PLANS:
        grid = grid_of(clip, sigma, parameters)
        width = grid.fill * grid.spacing / grid.noise_stddev
        stddev = grid.noise_stddev / grid.spacing  # as `noise_block` asks for it
        for shift in (0, 0.3, 0.77):
            right = -sigmas + shift * width
            # Whole numbers, so that the difference is exact.
            words = radii_below(right * stddev, angles, which, stddev)
            words -= radii_below((right - width) * stddev, angles, which, stddev)
            share = float(words.astype(np.float64).mean()) / 2**63
            exact = ncdf(right) - ncdf(right - width)
            worst = max(worst, abs(float(share / exact) - 1))
    assert words.max() > 100_000
    assert worst < 1e-5


def test_numbers_of_one_sign_are_half_of_all():
    angles = equally_spaced(4096)
    for which in (0, 1):
        below = radii_below(-1e-300, angles, which).astype(np.float64).mean() / 2**63
        assert below == pytest.approx(0.5, abs=1e-12)


def test_without_the_fill_there_would_be_holes():
    """What the fill is for: at 8 sigma neighbouring radii of the sampler are 1000 grid points apart."""
    grid = grid_of(1.0, 1.0, 11_000_000)
    opposite = np.array([2**63], dtype=np.uint64)  # half a turn: the cosine is -1
    (word,) = radii_below(-8.0, opposite, 0)
    words = word + np.arange(5, dtype=np.uint64) - np.uint64(2)
    values, _ = polar_normals(words, np.repeat(opposite, 5), grid.noise_stddev / grid.spacing)
    gaps = np.diff(values)
    assert (gaps > 1000).all()
    assert (gaps < grid.fill / 1000).all()
    assert grid.fill > 1_000_000
