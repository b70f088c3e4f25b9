"""The rehearsal engine: real servers and clients over TLS, killed in mid-run, and the same model as ever."""

import os
import signal

import pytest

from simulations.run import run_scenario
from simulations.scenario import make_scenario
from tests.deployment.federation import (
    charged_rounds,
    closed,
    every_round_once,
    finished,
    nobody_was_charged_twice,
    rehearsed,
    result,
    until,
    who_runs,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]
HOSPITALS = [f"phantom-hospital-{number}" for number in (1, 2, 3)]


def test_ci_a_rehearsal_ends_with_the_model_of_the_embedded_engine(tmp_path):
    flags = {"hospitals": 2, "rounds": 3, "reproducible": True, "out": str(tmp_path / "embedded")}
    embedded = run_scenario(make_scenario(flags))
    folder = tmp_path / "processes"
    with rehearsed(folder, "--hospitals", "2", "--rounds", "3", "--reproducible") as process:
        finished(process)
    assert result(folder)["engine"] == "processes"
    assert result(folder)["model"]["sha256"] == embedded.result["model"]["sha256"]
    for name in HOSPITALS[:2]:
        received = list((folder / "hospitals" / name / "state" / "models").glob("*/model.safetensors"))
        assert len(received) == 1


def test_ci_the_server_killed_in_round_3_and_a_hospital_in_round_2_lose_nothing(tmp_path):
    folder = tmp_path / "run"
    with rehearsed(folder, "--hospitals", "3", "--rounds", "5") as process:
        victim = HOSPITALS[1]
        until(lambda: any(number == 2 for number, _ in charged_rounds(folder, victim)), what="round 2")
        os.kill(who_runs(folder)[victim]["pid"], signal.SIGKILL)
        until(lambda: any(number == 3 for number, _ in charged_rounds(folder, HOSPITALS[0])), what="round 3")
        first = who_runs(folder)["server"]["pid"]
        os.kill(first, signal.SIGKILL)
        finished(process)
        assert who_runs(folder)["server"]["pid"] != first
        assert 3 in closed(folder)
    assert result(folder)["status"] == "completed"
    every_round_once(folder, 5)
    nobody_was_charged_twice(folder, HOSPITALS)
