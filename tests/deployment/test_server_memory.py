"""The server's memory does not grow with the hospitals: all at once, every process counted."""

import pytest

from simulations.benchmarks.server_memory import measure_server_memory

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
MODELS, CONSTANT = 3.0, 50e6
"""The bar in models, and bytes for what every round needs whatever its model: connections, code, pieces."""


def test_twenty_hospitals_at_once_need_three_models(tmp_path):
    measured = measure_server_memory(
        hospitals=20, parameters=5_000_000, rounds=2, timeout_s=500, folder=tmp_path
    )
    assert measured["updates_aggregated"] == [20, 20]
    assert measured["bytes_above_idle"] <= MODELS * measured["bytes_model"] + CONSTANT, measured["raw"]
    # The model would be there twenty times in one direction alone.
    assert measured["bytes_above_idle"] < 10 * measured["bytes_model"]
