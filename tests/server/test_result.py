"""Numbers of result.json that are computed, against hand-written metrics."""

import json

import pytest

from server.collection import Status
from server.result import write_result
from server.run_folder import RunFolder
from server.run_state import RunState
from tests.server.fake_federation import make_config, some_parameters


def line(round_number, hospital, *, sent, started, ended, received, outcome="aggregated"):
    times = {"sent": sent, "training_started": started, "training_ended": ended, "received": received}
    sizes = {"bytes_down": 100, "bytes_up": 70}
    return {"round": round_number, "hospital": hospital, "outcome": outcome, **times, **sizes}


def test_overhead_is_what_the_slowest_training_leaves_of_a_round(tmp_path):
    folder = RunFolder(tmp_path, new_run_id="r")
    folder.record(
        [
            line(1, "a", sent=10.0, started=10.1, ended=12.1, received=12.3),
            line(1, "b", sent=10.0, started=10.1, ended=13.1, received=13.2),
            {"round": 1, "closed": 13.5},  # 3.5 - 3.0
            # an answer sealed in an earlier session: its training took none of this round
            line(2, "a", sent=20.0, started=5.0, ended=9.0, received=20.25),
            {"round": 2, "closed": 20.5},  # 0.5 - 0.25
            # a hospital whose clock is wrong, one that is late
            line(3, "a", sent=30.0, started=99.0, ended=98.0, received=31.0),
            line(3, "b", sent=30.0, started=None, ended=None, received=None, outcome="late"),
            {"round": 3, "closed": 32.0},  # 2.0 - 0.0
        ]
    )
    config = make_config(tmp_path / "run")
    state = RunState.start(config, run_id="r", weights=some_parameters(0))
    write_result(folder, config, state, Status.COMPLETED, wall_s=60.0)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["time"] == {
        "wall_s": 60.0,
        "train_s": pytest.approx(3.25),
        "overhead_s_per_round": pytest.approx(0.5),
    }
    assert result["wire"] == {"bytes_up": 350, "bytes_down": 500, "bytes_up_float32": 4 * 4 * 15}
