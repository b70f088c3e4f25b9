"""Noise on the grid: the right distribution in each window, whole numbers only, the cost of rounding paid."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtri

from common.errors import GuardError
from common.privacy.noise import CLIP_SLACK, NoiseGrid, integer_noise
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness

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
    # Worst case: every coordinate of a unit is half a spacing off.
    extra = grid.spacing / 2 * math.sqrt(parameters) / clip
    assert clip * 2.0**-32 < grid.spacing <= clip * 2.0**-31
    assert grid.noise_stddev / (sigma * clip) - 1 == pytest.approx(extra + CLIP_SLACK, rel=1e-6)
    assert grid.noise_stddev / (sigma * clip) - 1 < 2e-6
    # The fill changes the variance by less than it takes to be seen, and is wide enough to be of use.
    width = grid.fill * grid.spacing / grid.noise_stddev
    assert 2.0**-9 < width <= 2.0**-8
    assert width**2 / 12 < 1.3e-6


@pytest.mark.parametrize("changes", [{"enrolled_units": 10**9}, {"sigma": 1e12}], ids=str)
def test_what_does_not_fit_into_64_bits_is_refused(changes):
    with pytest.raises(GuardError, match="64-bit"):
        NoiseGrid.of(make_plan(**changes), num_parameters=25_000_000)


def test_a_million_patients_and_large_noise_fit():
    for clip, parameters in ((0.75, 25_000_000), (1.99, 2**24), (100.0, 1)):
        plan = make_plan(clip, 1000.0, enrolled_units=10**6)
        grid = NoiseGrid.of(plan, num_parameters=parameters)
        # Nine standard deviations and a million patients who all point the same way.
        assert 9.2 * grid.noise_stddev / grid.spacing + 10**6 * clip / grid.spacing < 2**62


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

    def normal(self, size):
        return self.normals[:size].copy()

    def integers(self, high, size):
        return np.full(size, high // 2)


def test_each_normal_is_rounded_to_the_nearest_grid_point():
    grid = grid_of(1.0, 1.0, 10_000)
    normals = np.array([0.0, 1.0, -1.0, 9.1, -9.1, 1e-12])
    found = integer_noise(6, grid=grid, stream=Words(normals))
    exact = [round(z * grid.noise_stddev / grid.spacing) for z in normals.tolist()]
    assert found.tolist() == exact


def words_below(z):
    """How many of the 2**63 words of one sign the sampler maps to -infinity..z (z < 0), by bisection."""
    low, high = 0, 2**63
    while low < high:
        middle = (low + high) // 2
        tail = (np.float64(np.uint64(middle)) + 0.5) * 2.0**-64
        low, high = (middle + 1, high) if ndtri(tail) <= z else (low, middle)
    return low


@pytest.mark.parametrize("sigmas", [0.01, 0.5, 1, 2, 3, 4, 5, 6, 6.5, 7])
def test_every_window_of_the_fill_has_its_probability(sigmas):
    """The claim of the module, counted word by word: right to 1e-5 up to 7 sigma, no hole anywhere."""
    from mpmath import mp, ncdf

    mp.dps = 50
    worst = 0.0
    for clip, sigma, parameters in PLANS:
        grid = grid_of(clip, sigma, parameters)
        width = grid.fill * grid.spacing / grid.noise_stddev
        for shift in (0, 0.3, 0.77):
            right = -sigmas + shift * width
            words = words_below(right) - words_below(right - width)
            exact = (ncdf(right) - ncdf(right - width)) * 2**64
            worst = max(worst, abs(float(words / exact) - 1))
    assert words > 100_000
    assert worst < 1e-5


def test_without_the_fill_there_would_be_holes():
    """What the fill is for: at 7 sigma neighbouring values of the sampler are many grid points apart."""
    grid = grid_of(1.0, 1.0, 11_000_000)
    word = words_below(-7.0)
    tails = (np.arange(word - 2, word + 3, dtype=np.float64) + 0.5) * 2.0**-64
    assert (np.diff(ndtri(tails)) * grid.noise_stddev / grid.spacing > 5).all()
    assert grid.fill > 1_000_000
