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
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from common.privacy.sampling import poisson_sample

ALPHA = 1e-6
SOURCES = [SecureRandomness(), ReproducibleRandomness(7, "north")]


def stream(source, purpose="noise", round_number=1, step=0):
    return source.stream(purpose=purpose, round_number=round_number, step=step)


@pytest.fixture(params=SOURCES, ids=["secure", "reproducible"])
def source(request):
    return request.param


def test_normals_are_standard_normal_and_uncorrelated(source):
    values = stream(source).normal((500, 400))
    assert values.shape == (500, 400)
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


def test_extreme_words_of_the_cipher_give_finite_normals():
    class Extreme:
        def update(self, zeros):
            words = [0, 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]
            return np.array(words, dtype="<u8").tobytes()[: len(zeros)]

    drawn = SecureRandomness().stream(purpose="noise", round_number=1, step=1)
    drawn._cipher = Extreme()
    values = drawn.normal(6)
    assert np.isfinite(values).all()
    assert values[0] == pytest.approx(-9.1, abs=0.1)
    assert values[3] == pytest.approx(9.1, abs=0.1)
    assert abs(values[2]) < 1e-9
    assert values[0] == -values[3]


def test_secure_streams_never_repeat():
    one, two = SecureRandomness(), SecureRandomness()
    draws = [stream(one), stream(one), stream(two), stream(one, step=1)]
    words = [drawn.normal(4).tobytes() for drawn in draws]
    assert len(set(words)) == 4
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
    with pytest.raises(GuardError, match="another process"):
        drawn.normal(1)


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
    ]
    assert len({other.normal(5).tobytes() for other in others} | {same.tobytes()}) == 6


def test_memory_of_large_draws_is_bounded_by_blocks():
    drawn = stream(SecureRandomness())
    sizes = []
    words = type(drawn)._words

    class Watched(type(drawn)):
        def _words(self, count):
            sizes.append(count)
            return words(self, count)

    watched = Watched()
    assert watched.normal(3 * randomness._BLOCK + 5).shape == (3 * randomness._BLOCK + 5,)
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
