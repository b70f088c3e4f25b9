"""Half of the hospitals go and come back: the run ends in words and goes on where it was when told to."""

import pytest

from common.exit_codes import ExitCode
from simulations.engines.rehearsal import SERVER
from tests.deployment.federation import (
    charged_rounds,
    closed,
    every_round_once,
    nobody_was_charged_twice,
    until,
)
from tests.deployment.operated import operated

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


def test_half_of_the_hospitals_gone_end_the_run_and_it_is_resumed_when_they_are_back(tmp_path):
    folder = tmp_path / "run"
    settings = ["privacy.local-steps=10", "server.quorum=3", "server.patience-s=6", "server.deadline-s=15"]
    with operated(folder, hospitals=4, rounds=3, settings=settings) as federation:
        gone = federation.names[2:]
        until(lambda: all((2, False) in charged_rounds(folder, n) for n in gone), what="round 2")
        federation.kill(*gone)
        assert federation.server_ends(within_s=120) == ExitCode.QUORUM_LOST
        assert federation.status_of_run == "quorum-lost"
        assert closed(folder) == [1]
        assert (folder / "checkpoints" / "1" / "manifest.json").exists()
        said = federation.said(SERVER)
        assert "quorum-lost" in said
        assert "the quorum is lost: 2 valid updates, 3 are needed" in (
            federation.operator.federation_log.read_text()
        )
        # A plain start tells what to type instead of training without being asked.
        federation.start(SERVER)
        assert federation.server_ends(within_s=30) == ExitCode.BAD_CONFIGURATION
        assert "flower-server resume" in federation.said(SERVER)
        # Patience may be changed in a run; six seconds are less than a hospital needs to start.
        file = federation.operator.federation_toml
        settings = file.read_text()
        assert "\npatience-s = 6.0\n" in settings
        file.write_text(settings.replace("\npatience-s = 6.0\n", "\npatience-s = 60.0\n"))
        federation.start(*gone)
        federation.resume()
        assert federation.server_ends() == ExitCode.COMPLETED
    assert federation.status_of_run == "completed"
    every_round_once(folder, 3)
    nobody_was_charged_twice(folder, federation.names)
    for name in federation.names:
        assert sorted(charged_rounds(folder, name)) == [(number, True) for number in (1, 2, 3)]
