"""The profile by layer counts every moment once and under the right name."""

import pytest
import torch

from simulations.benchmarks.cases import StepCase
from simulations.benchmarks.layer_profile import TOGETHER, by_kind, profile_step
from simulations.benchmarks.tables import profile_table


@pytest.fixture(scope="module")
def profiled():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return profile_step(StepCase.parse("cnn:28:8:ragged"), repeats=1)
    finally:
        torch.set_num_threads(threads)


def test_every_layer_and_phase_is_named(profiled):
    layers = {row["layer"]: row for row in profiled["layers"]}
    for number in (1, 2, 3):
        row = layers[f"convolution{number}"]
        assert row["kind"] == "Conv2d"
        # The weights' share of the twin is a difference of two clocks: beside other load it may be none.
        assert "forward" in row["sgd"]
        assert set(row["sgd"]) & {"weight gradient", "data gradient"}
        assert set(row["dp"]) >= {"forward", "weight gradient", "norms", "clipped sum"}
    assert "data gradient" not in layers["convolution1"]["sgd"]  # nobody needs it
    assert layers["pool1"]["dp"]["data gradient"] > 0
    assert any("noise" in row["dp"] for row in layers.values())
    assert layers[TOGETHER]["dp"]["norms"] > 0


def test_nothing_is_counted_twice(profiled):
    for side in ("sgd", "dp"):
        cells = sum(sum(row[side].values()) for row in profiled["layers"])
        assert cells == pytest.approx(profiled["seconds"][side])
    kinds = by_kind(profiled)
    assert sum(row["kind"] == "Conv2d" for row in kinds) == 1
    assert sum(sum(row["dp"].values()) for row in kinds) == pytest.approx(profiled["seconds"]["dp"])


def test_a_table_has_a_cell_for_every_column(profiled):
    columns, rows = profile_table(profiled)
    assert {len(row) for row in rows} == {len(columns)}
    assert rows[-1][0] == "all"
