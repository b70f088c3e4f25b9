import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError
from common.quantisation import MOST, Levels
from common.server_settings import MOST_HOSPITALS
from server.aggregation import aggregate, mean_on_grid
from server.spool import Spool
from tests.server.fake_federation import TEMPLATE, HeldVector, some_parameters

VECTORS = [np.random.default_rng(k).normal(size=1000).astype(np.float32) for k in range(5)]
WEIGHTS = [120.0, 40.0, 800.0, 10.0, 60.0]


def held(vectors):
    return [HeldVector(vector) for vector in vectors]


def test_the_example_of_the_docstring():
    updates = held([np.array([1, 2], np.float32), np.array([4, 8], np.float32)])
    assert aggregate(updates, [1, 3]).tolist() == [3.25, 6.5]


def test_it_is_the_exact_mean_to_float32():
    from fractions import Fraction

    result = aggregate(held(VECTORS), WEIGHTS)
    for position in range(0, 1000, 97):
        pairs = zip(VECTORS, WEIGHTS, strict=True)
        exact = sum(Fraction(w) * Fraction(float(v[position])) for v, w in pairs) / Fraction(sum(WEIGHTS))
        assert result[position] == pytest.approx(float(exact), rel=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2000))
def test_the_block_length_changes_no_bit(block_length):
    assert (
        aggregate(held(VECTORS), WEIGHTS, block_length=block_length).tobytes()
        == aggregate(held(VECTORS), WEIGHTS).tobytes()
    )


def test_another_rule_plugs_in():
    def median(blocks, weights):
        return np.median(np.stack(blocks).astype(np.float64), axis=0)

    expected = np.median(np.stack(VECTORS).astype(np.float64), axis=0).astype(np.float32)
    assert aggregate(held(VECTORS), WEIGHTS, rule=median, block_length=64).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "weights", [[], [1.0], [1.0, 2.0, 3.0, 4.0, 0.0], [1.0, 2.0, 3.0, 4.0, float("nan")]]
)
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="positive weights"):
        aggregate(held(VECTORS), weights)


def test_other_lengths_are_refused():
    with pytest.raises(ValueError, match="lengths"):
        aggregate(held([np.zeros(3, np.float32), np.zeros(4, np.float32)]), [1, 1])


def test_the_spool_gives_back_what_it_got_in_the_order_asked(tmp_path):
    spool = Spool(tmp_path / "spool", TEMPLATE)
    deltas = {name: some_parameters(seed) for seed, name in enumerate(["a", "b", "c"])}
    deltas["a"] = dict(reversed(deltas["a"].items()))
    for name, delta in deltas.items():
        spool.add(name, delta)
    with spool.opened(["c", "a"]) as vectors:
        for name, vector in zip(["c", "a"], vectors, strict=True):
            whole, part = np.empty(15, np.float32), np.empty(3, np.float32)
            vector.read(0, whole)
            vector.read(2, part)
            assert part.tobytes() == whole.tobytes()[8:20]
            back = spool.unflatten(whole)
            assert {key: value.tobytes() for key, value in back.items()} == {
                key: value.tobytes() for key, value in deltas[name].items()
            }
            assert {key: value.shape for key, value in back.items()} == {"bias": (3,), "weight": (4, 3)}
    spool.clear()
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize(
    "update",
    [
        {"bias": np.zeros(3, np.float32), "weight": np.zeros((3, 4), np.float32)},
        {"bias": np.zeros(3, np.float32)},
        Levels(fitting=np.zeros(14, np.int8), places=np.zeros(0, np.uint32), rest=np.zeros(0, np.int32)),
    ],
)
def test_the_spool_refuses_another_model(tmp_path, update):
    with pytest.raises(ValueError, match="model"):
        Spool(tmp_path / "spool", TEMPLATE).add("a", update)


def test_a_leftover_of_a_killed_server_is_not_aggregated(tmp_path):
    Spool(tmp_path / "spool", TEMPLATE).add("ghost", some_parameters(1))
    Spool(tmp_path / "spool", TEMPLATE)
    assert not (tmp_path / "spool").exists()


def test_a_spool_that_was_cut_is_noticed(tmp_path):
    spool = Spool(tmp_path / "spool", TEMPLATE)
    spool.add("a", some_parameters(1))
    (file,) = (tmp_path / "spool").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with spool.opened(["a"]) as vectors, pytest.raises(CheckpointError, match="cut"):
        aggregate(vectors, [1])


def test_memory_does_not_grow_with_hospitals(tmp_path):
    import tracemalloc

    length = 2**20
    names = [f"hospital-{number}" for number in range(12)]
    floats = Spool(tmp_path / "float32", {"w": (length,)})
    whole = Spool(tmp_path / "grid", {"w": (length,)})
    delta = {"w": np.ones(length, np.float32)}
    beside = Levels(
        fitting=np.full(length, 127, np.int8),
        places=np.arange(0, length, 4, dtype=np.uint32),
        rest=np.ones(length // 4, np.int32),
    )
    for name in names:
        floats.add(name, delta)
        whole.add(name, beside)
    tracemalloc.start()
    with floats.opened(names) as vectors:
        result = aggregate(vectors, [1.0] * len(names))
    assert (result == 1.0).all()
    del result
    with whole.opened(names) as updates:
        result = mean_on_grid(updates, total_weight=12, scales=[(slice(0, length), 0.5)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(result[::4]) == {64.0}
    assert set(result[1::4]) == {63.5}
    assert peak < 2 * 4 * length  # the updates together are 12 times the model


def some_levels(seed, length, *, beside=20):
    random = np.random.default_rng(seed)
    fitting = random.integers(-127, 128, length).astype(np.int8)
    places = np.sort(random.choice(length, beside, replace=False)).astype(np.uint32)
    fitting[places] = 127
    return Levels(fitting=fitting, places=places, rest=random.integers(1, 2**31 - 127, beside, np.int32))


def test_the_mean_on_the_grid_is_exact_in_any_order(tmp_path):
    """Against whole numbers of Python, over more hospitals than add up in 16 bits and more than one block."""
    length, template = 70_001, {"a": (70_000,), "b": ()}
    updates = {f"h{number:03d}": some_levels(number, length) for number in range(300)}
    weights = {name: 10 + number for number, name in enumerate(updates)}
    spool = Spool(tmp_path / "spool", template)
    for name, update in updates.items():
        spool.add(name, update)
    scales = [(slice(0, 70_000), 2.0**-10), (slice(70_000, 70_001), 2.0**3)]
    results = []
    for names in (sorted(updates), sorted(updates, reverse=True)):
        with spool.opened(names) as opened:
            results.append(
                mean_on_grid(opened, total_weight=sum(weights[name] for name in names), scales=scales)
            )
    assert results[0].tobytes() == results[1].tobytes()
    whole = [update.whole(slice(0, length)) for update in updates.values()]
    busy = np.unique(np.concatenate([update.places for update in updates.values()]))
    for position in [0, 65_535, 65_536, 70_000, *busy[:50].tolist()]:
        exact = sum(int(one[position]) for one in whole) * (8.0 if position == 70_000 else 2.0**-10)
        assert results[0][position] == np.float32(exact / sum(weights.values()))


def test_sums_at_the_bound_are_exact():
    """The proven bound: MOST_HOSPITALS hospitals with the largest number each, in int64 and as float64."""
    assert MOST_HOSPITALS * (MOST + 1) == 2**51
    assert int(np.float64(MOST_HOSPITALS * MOST)) == MOST_HOSPITALS * MOST
    assert 258 * 127 < 2**15 <= 259 * 127


def test_what_cannot_be_a_mean_is_refused(tmp_path):
    with pytest.raises(ValueError, match="updates"):
        mean_on_grid([], total_weight=1, scales=[])
    with pytest.raises(ValueError, match="updates"):
        mean_on_grid(range(MOST_HOSPITALS + 1), total_weight=1, scales=[])
