import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.aggregation import aggregate, weighted_mean
from server.spool import Spool
from tests.server.fake_federation import some_parameters

VECTORS = [np.random.default_rng(k).normal(size=1000).astype(np.float32) for k in range(5)]
WEIGHTS = [120.0, 40.0, 800.0, 10.0, 60.0]


def test_the_example_of_the_docstring():
    blocks = [np.array([1, 2], np.float32), np.array([4, 8], np.float32)]
    assert weighted_mean(blocks, [1, 3]).tolist() == [3.25, 6.5]


def test_it_is_the_exact_mean_to_float32():
    from fractions import Fraction

    result = aggregate(VECTORS, WEIGHTS)
    for position in range(0, 1000, 97):
        pairs = zip(VECTORS, WEIGHTS, strict=True)
        exact = sum(Fraction(w) * Fraction(float(v[position])) for v, w in pairs) / Fraction(sum(WEIGHTS))
        assert result[position] == pytest.approx(float(exact), rel=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2000))
def test_the_block_length_changes_no_bit(block_length):
    assert (
        aggregate(VECTORS, WEIGHTS, block_length=block_length).tobytes()
        == aggregate(VECTORS, WEIGHTS).tobytes()
    )


def test_another_rule_plugs_in():
    def median(blocks, weights):
        return np.median(np.stack(blocks).astype(np.float64), axis=0)

    expected = np.median(np.stack(VECTORS).astype(np.float64), axis=0).astype(np.float32)
    assert aggregate(VECTORS, WEIGHTS, rule=median, block_length=64).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "weights", [[], [1.0], [1.0, 2.0, 3.0, 4.0, 0.0], [1.0, 2.0, 3.0, 4.0, float("nan")]]
)
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="positive weights"):
        aggregate(VECTORS, weights)


def test_other_lengths_are_refused():
    with pytest.raises(ValueError, match="lengths"):
        aggregate([np.zeros(3, np.float32), np.zeros(4, np.float32)], [1, 1])


def test_the_spool_gives_back_what_it_got_in_the_order_asked(tmp_path):
    spool = Spool(tmp_path / "spool")
    deltas = {name: some_parameters(seed) for seed, name in enumerate(["a", "b", "c"])}
    deltas["a"] = dict(reversed(deltas["a"].items()))
    for name, delta in deltas.items():
        spool.add(name, delta)
    vectors = spool.vectors(["c", "a"])
    for name, vector in zip(["c", "a"], vectors, strict=True):
        back = spool.unflatten(name, vector[:])
        assert vector[2:5].tobytes() == vector[:].tobytes()[8:20]
        assert {key: value.tobytes() for key, value in back.items()} == {
            key: value.tobytes() for key, value in deltas[name].items()
        }
        assert {key: value.shape for key, value in back.items()} == {"bias": (3,), "weight": (4, 3)}
    spool.clear()
    assert not (tmp_path / "spool").exists()


def test_the_spool_refuses_a_mixture_of_models(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.add("a", {"w": np.zeros((2, 3), np.float32)})
    spool.add("b", {"w": np.zeros((3, 2), np.float32)})
    with pytest.raises(ValueError, match="one model"):
        spool.vectors(["a", "b"])


def test_a_leftover_of_a_killed_server_is_not_aggregated(tmp_path):
    Spool(tmp_path / "spool").add("ghost", some_parameters(1))
    assert not list(Spool(tmp_path / "spool")._folder.glob("*"))


def test_memory_does_not_grow_with_hospitals(tmp_path):
    import tracemalloc

    spool, length = Spool(tmp_path / "spool"), 2**20
    names = [f"hospital-{number}" for number in range(12)]
    delta = {"w": np.ones(length, np.float32)}
    for name in names:
        spool.add(name, delta)
    tracemalloc.start()
    result = aggregate(spool.vectors(names), [1.0] * len(names), block_length=2**14)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.tolist() == [1.0] * length
    assert peak < 1.5 * 4 * length  # the updates together are 12 times the model
