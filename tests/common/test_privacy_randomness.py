"""Noise and sampling: the right distributions (false alarm 1e-6 per test), distinct, and secret."""

import copy
import json
import multiprocessing
import pickle

import numpy as np
import pytest
from scipy import stats

from common.errors import GuardError
from common.privacy import randomness
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness, polar_normals
from common.privacy.sampling import poisson_sample

ALPHA = 1e-6
SOURCES = [SecureRandomness(), ReproducibleRandomness(7, "north")]


def stream(source, purpose="noise", round_number=1, step=0):
    return source.stream(purpose=purpose, round_number=round_number, step=step)


@pytest.fixture(params=SOURCES, ids=["secure", "reproducible"])
def source(request):
    return request.param


def test_normals_are_standard_normal_and_uncorrelated(source):
    values = stream(source).normal((1500, 400))
    assert values.shape == (1500, 400)
    assert values.dtype == np.float64
    flat = values.ravel()
    assert np.isfinite(flat).all()
    assert stats.kstest(flat, "norm").pvalue > ALPHA
    limit = stats.norm.isf(ALPHA / 2)
    count = len(flat)
    assert abs(flat.mean()) < limit / np.sqrt(count)
    assert ALPHA < stats.chi2.cdf((flat**2).sum(), count) < 1 - ALPHA
    for lag in (1, 2, 400, randomness._BLOCK):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < limit / np.sqrt(count - lag)
    # The fourth moment of the tails: variance of z^4 is 96.
    assert abs((flat**4).mean() - 3) < limit * np.sqrt(96 / count)


def test_uniforms_lie_in_the_half_open_interval_and_fill_it(source):
    values = stream(source, "sampling").uniform(200_000)
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > ALPHA


def test_integers_and_permutation(source):
    numbers = stream(source, "shuffle").integers(7, (100, 700))
    assert numbers.shape == (100, 700)
    assert numbers.dtype == np.int64
    assert stats.chisquare(np.bincount(numbers.ravel(), minlength=7)).pvalue > ALPHA
    drawn = stream(source, "shuffle")
    orders = np.array([drawn.permutation(5) for _ in range(2000)])
    assert (np.sort(orders, axis=1) == np.arange(5)).all()
    for place in range(5):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=5)).pvalue > ALPHA


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("high", [1, 2, 2**20, 2**31, 3 * 2**29, 2**32, 2**62 + 2**61, 2**63])
def test_whole_numbers_fill_what_is_given_evenly(source, high, kind):
    drawn, count = stream(source), 2 * randomness._PAIRS + 70_001
    into = np.full(count, -1, dtype=kind)
    if high - 1 > np.iinfo(kind).max:
        with pytest.raises(ValueError, match=r"2\*\*31"):
            drawn.fill_integers(high, into)
        return
    drawn.fill_integers(high, into)
    assert into.min() >= 0
    assert into.max() < high
    counts = np.bincount((into.astype(np.float64) * (min(high, 8) / high)).astype(np.int64))
    assert high == 1 or stats.chisquare(counts).pvalue > ALPHA
    if high >= 16:
        assert stats.chisquare(np.bincount(into & 15, minlength=16)).pvalue > ALPHA
        limit = stats.norm.isf(ALPHA / 2)
        for lag in (1, 2, randomness._PAIRS, 2 * randomness._PAIRS):
            assert abs(np.corrcoef(into[lag:], into[:-lag])[0, 1]) < 2 * limit / np.sqrt(count - lag)


@pytest.mark.parametrize("high", [0, -1, 2**63 + 1, 2**64])
def test_a_range_without_numbers_or_beyond_64_bits_is_refused(source, high):
    with pytest.raises(ValueError, match=r"between 1 and 2\*\*63"):
        stream(source).integers(high, 3)


def test_filling_draws_the_same_as_asking(source, monkeypatch):
    monkeypatch.setattr(randomness.os, "urandom", bytes)
    for count in (0, 1, 5, 2 * randomness._PAIRS + 3):
        asked, filled = stream(source), stream(source)
        for stddev in (1.0, 2.0**40):
            into = np.full(count, np.nan)
            filled.fill_normal(into, stddev)
            assert np.allclose(into, stddev * asked.normal(count), rtol=1e-15, atol=0)
        for high in (2**23, 10, 2**40):
            whole = np.full(count, -1, dtype=np.int64)
            filled.fill_integers(high, whole)
            assert (whole == asked.integers(high, count)).all()


def test_a_room_belongs_to_one_at_a_time_and_is_used_again():
    rooms = randomness.Rooms(list)
    with rooms.borrowed() as first, rooms.borrowed() as second:
        assert first is not second
    with pytest.raises(KeyError), rooms.borrowed() as again:
        raise KeyError
    assert again is first
    with rooms.borrowed() as last:
        assert last is first


EXTREME = np.array(
    [0, 1, 2, 2**11, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 3 * 2**62, 2**64 - 2, 2**64 - 1], "<u8"
)


def test_extreme_words_of_the_cipher_give_finite_normals():
    radii, angles = (words.ravel() for words in np.meshgrid(EXTREME, EXTREME))
    first, second = polar_normals(radii.copy(), angles.copy())
    assert np.isfinite(first).all()
    assert np.isfinite(second).all()
    largest = np.sqrt(128 * np.log(2))  # u = 2**-64
    assert np.abs(first).max() == pytest.approx(largest, rel=1e-12)
    assert np.abs(second).max() == pytest.approx(largest, rel=1e-12)
    assert np.hypot(first, second).max() < 9.42
    assert np.abs(first[radii % 2**63 == 2**63 - 1]).max() < 1e-9

    class Extreme(type(stream(SecureRandomness()))):
        def _words(self, count, into=None):
            return np.resize(EXTREME, count)

    assert np.isfinite(Extreme().normal(1001)).all()
    assert np.isfinite(Extreme().uniform(1001)).all()


def test_normals_are_those_of_box_and_muller():
    """Against 40 digits, at words of any size, far out too."""
    from mpmath import cos, log, mp, mpf, pi, sin, sqrt

    mp.dps = 40
    rng = np.random.default_rng(0)
    radii = rng.integers(0, 2**64, 300, dtype=np.uint64) >> np.arange(300, dtype=np.uint64) % np.uint64(60)
    angles = rng.integers(0, 2**64, 300, dtype=np.uint64)
    first, second = polar_normals(radii.copy(), angles.copy())
    for radius, angle, one, other in zip(radii.tolist(), angles.tolist(), first, second, strict=True):
        length = sqrt(-2 * log((mpf(radius % 2**63) + 0.5) / 2**63))
        turn = 2 * pi * mpf(angle >> 11) / 2**53
        assert abs(float(length * cos(turn) - one)) < 1e-14
        assert abs(float(length * sin(turn) - other)) < 1e-14


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 2 * randomness._PAIRS - 1, 2 * randomness._PAIRS + 3])
def test_any_number_of_normals_all_of_them_fresh(count):
    values = stream(SecureRandomness()).normal(count)
    assert values.shape == (count,)
    assert len(np.unique(values)) == count


def test_both_normals_of_a_pair_are_independent():
    """They share a radius: without right angles their squares would be related."""
    values = stream(SecureRandomness()).normal(400_000)
    first, second = values[:200_000], values[200_000:]
    limit = stats.norm.isf(ALPHA / 2) / np.sqrt(len(first))
    assert abs((first * second).mean()) < limit
    assert abs(((first**2 - 1) * (second**2 - 1)).mean() / 2) < limit
    assert stats.kstest(np.arctan2(second, first) / (2 * np.pi) + 0.5, "uniform").pvalue > ALPHA
    assert stats.kstest(np.hypot(first, second), "rayleigh").pvalue > ALPHA


def test_secure_streams_never_repeat():
    one, two = SecureRandomness(), SecureRandomness()
    draws = [stream(one), stream(one), stream(two), stream(one, step=1)]
    draws.append(one.stream(purpose="noise", round_number=1, step=0, part=1))
    words = [drawn.normal(4).tobytes() for drawn in draws]
    assert len(set(words)) == 5
    assert one.private is True


def _draw(queue):
    queue.put(SecureRandomness().stream(purpose="noise", round_number=1, step=0).normal(4).tolist())


def test_processes_differ():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_draw, args=(queue,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    first, second = queue.get(timeout=60), queue.get(timeout=60)
    for worker in workers:
        worker.join(timeout=60)
    queue.close()
    queue.join_thread()
    assert first != second


def test_a_stream_does_not_survive_a_fork(monkeypatch):
    drawn = stream(SecureRandomness())
    drawn.normal(1)
    monkeypatch.setattr(randomness.os, "getpid", lambda: -1)
    for draw in (
        lambda: drawn.normal(1),
        lambda: drawn.fill_normal(np.zeros(1)),
        lambda: drawn.integers(8, 1),
        lambda: drawn.fill_integers(7, np.zeros(1, np.int64)),
        lambda: drawn.uniform(1),
    ):
        with pytest.raises(GuardError, match="another process"):
            draw()


def test_the_key_cannot_be_seen_or_stored(monkeypatch):
    key = b"K" * 32
    monkeypatch.setattr(randomness.os, "urandom", lambda size: key[:size])
    source, drawn = SecureRandomness(), stream(SecureRandomness())
    for thing in (source, drawn):
        shown = repr(thing) + str(thing)
        assert "KKKK" not in shown
        assert key.hex() not in shown
    assert not hasattr(drawn, "__dict__")
    assert vars(source) == {}
    for store in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            store(drawn)
    with pytest.raises(TypeError):
        json.dumps(drawn)


def test_reproducible_streams_are_equal_where_and_only_where_their_arguments_are():
    source = ReproducibleRandomness(7, "north")
    assert source.private is False
    same = stream(ReproducibleRandomness(7, "north")).normal(5)
    assert (stream(source).normal(5) == same).all()
    others = [
        stream(ReproducibleRandomness(8, "north")),
        stream(ReproducibleRandomness(7, "south")),
        stream(source, "sampling"),
        stream(source, round_number=2),
        stream(source, step=1),
        source.stream(purpose="noise", round_number=1, step=0, part=1),
    ]
    assert len({other.normal(5).tobytes() for other in others} | {same.tobytes()}) == 7
    again = source.stream(purpose="noise", round_number=1, step=0, part=0)
    assert (again.normal(5) == same).all()


def test_memory_of_large_draws_is_bounded_by_blocks():
    drawn = stream(SecureRandomness())
    sizes = []
    words = type(drawn)._words

    class Watched(type(drawn)):
        def _words(self, count, into=None):
            sizes.append(count)
            return words(self, count, into)

    watched, count = Watched(), 3 * randomness._BLOCK + 5
    assert watched.normal(count).shape == (count,)
    assert max(sizes) == randomness._PAIRS
    assert sum(sizes) == count + 1  # a radius and an angle for every two
    sizes.clear()
    watched.uniform(count)
    assert sizes == [randomness._BLOCK] * 3 + [5]


def test_inclusion_is_bernoulli_and_independent(source):
    units, rate, steps = 200, 0.3, 400
    chosen = np.zeros((steps, units))
    for step in range(steps):
        members = poisson_sample(units, rate, stream(source, "sampling", step=step))
        assert members.dtype == np.int64
        assert (np.diff(members) > 0).all()
        chosen[step, members] = 1
    variance = rate * (1 - rate)
    # Each unit's count is Binomial(steps, q): the standardised squares are chi-square.
    per_unit = ((chosen.sum(axis=0) - steps * rate) ** 2 / (steps * variance)).sum()
    assert ALPHA < stats.chi2.cdf(per_unit, units) < 1 - ALPHA
    # The batch sizes are Binomial(units, q): a fixed batch size would have no variance at all.
    per_step = ((chosen.sum(axis=1) - units * rate) ** 2 / (units * variance)).sum()
    assert ALPHA < stats.chi2.cdf(per_step, steps) < 1 - ALPHA
    centred = (chosen - rate) / np.sqrt(variance)
    limit = stats.norm.isf(ALPHA / 2)
    for lagged in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(lagged.mean()) < limit / np.sqrt(lagged.size)


def test_sampling_edges():
    drawn = stream(SecureRandomness(), "sampling")
    assert (poisson_sample(5, 1, drawn) == np.arange(5)).all()
    assert poisson_sample(0, 0.5, drawn).shape == (0,)
    assert poisson_sample(1000, 1e-12, drawn).shape == (0,)
    for units, rate in [(5, 0), (5, 1.5), (-1, 0.5), (5, np.nan)]:
        with pytest.raises(ValueError, match="rate"):
            poisson_sample(units, rate, drawn)
