import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.examples import Examples, concatenate


def table(units, unit_ids=None):
    rows = len(units)
    units = np.array(units, np.int64)
    count = int(units.max()) + 1 if rows else 0
    return Examples(
        inputs={"image": np.arange(rows, dtype=np.uint8).reshape(rows, 1, 1, 1)},
        targets=np.arange(rows, dtype=np.int64) % 2,
        units=units,
        unit_ids=tuple(unit_ids or (f"patient-{u}" for u in range(count))),
    )


@given(st.lists(st.integers(0, 5), max_size=20))
def test_the_index_finds_exactly_the_rows_that_a_search_finds(units):
    examples = table(units)
    slow = [[row for row, owner in enumerate(units) if owner == u] for u in range(examples.num_units)]
    assert [rows.tolist() for rows in examples.rows_of_units()] == slow
    assert [examples.unit_rows.of(u).tolist() for u in range(examples.num_units)] == slow


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.permutations(range(6)), st.integers(0, 6))
def test_selected_units_keep_all_their_rows_in_the_order_asked_for(units, order, how_many):
    examples = table(units)
    chosen = [u for u in order if u < examples.num_units][:how_many]
    picked = examples.select_units(chosen)
    expected = [row for unit in chosen for row in range(len(units)) if units[row] == unit]
    assert picked.inputs["image"].ravel().tolist() == expected
    assert picked.targets.tolist() == [row % 2 for row in expected]
    assert picked.unit_ids == tuple(f"patient-{u}" for u in chosen)
    assert [picked.unit_ids[u] for u in picked.units] == [f"patient-{units[row]}" for row in expected]


def test_rows_that_lie_together_are_a_view():
    examples = table([0, 0, 1, 2, 2])
    assert np.shares_memory(examples.select_units([1, 2]).inputs["image"], examples.inputs["image"])
    assert not np.shares_memory(examples.select_units([0, 2]).inputs["image"], examples.inputs["image"])


def test_concatenation_joins_a_patient_seen_in_two_tables():
    joined = concatenate([table([0, 1], ["anna", "bert"]), table([0, 0, 1], ["bert", "carla"])])
    assert joined.unit_ids == ("anna", "bert", "carla")
    assert joined.units.tolist() == [0, 1, 1, 1, 2]
    assert joined.inputs["image"].ravel().tolist() == [0, 1, 0, 1, 2]


def test_no_patient_id_is_printed():
    assert "anna" not in repr(table([0], ["anna"])) + str(table([0], ["anna"]))


@pytest.mark.parametrize("units", [[0, 0], [3], [-1]])
def test_a_unit_named_twice_or_absent_is_refused(units):
    with pytest.raises(ValueError, match="unit"):
        table([0, 1, 2]).select_units(units)


def test_columns_that_do_not_fit_are_refused():
    good = table([0, 1])
    fields = {
        "inputs": good.inputs,
        "targets": good.targets,
        "units": good.units,
        "unit_ids": good.unit_ids,
    }
    for broken in (
        {"targets": good.targets[:1]},
        {"units": np.array([0, 2])},
        {"units": np.array([-1, 0])},
        {"inputs": {"image": good.inputs["image"][:1]}},
    ):
        with pytest.raises(ValueError, match=r"rows|units"):
            Examples(**(fields | broken))
    with pytest.raises(ValueError, match="nothing"):
        concatenate([])
    with pytest.raises(ValueError, match="names"):
        concatenate(
            [
                good,
                Examples(
                    inputs={"age": good.targets}, targets=good.targets, units=good.units, unit_ids=("a", "b")
                ),
            ]
        )


def test_an_empty_table_is_a_table():
    empty = table([])
    assert empty.num_rows == empty.num_units == 0
    assert empty.rows_of_units() == []
    assert empty.select_units([]).num_rows == 0
