"""The server's disk is full: nothing that was there is lost, the words say what to do, and it goes on."""

import time

import pytest

from common.exit_codes import ExitCode
from server.checkpoint import restore_newest
from simulations.engines.rehearsal import SERVER
from tests.deployment.federation import closed, every_round_once, nobody_was_charged_twice, until
from tests.deployment.operated import operated
from tests.deployment.small_disks import small_disk

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
LONG_ENOUGH = ("privacy.local-steps=20",)


def test_a_full_disk_at_the_checkpoint_ends_the_run_and_resume_goes_on(tmp_path):
    folder = tmp_path / "run"
    with (
        operated(folder, rounds=4, settings=LONG_ENOUGH, starts=False) as federation,
        small_disk(folder / "checkpoints", megabytes=2) as disk,
    ):
        federation.start()
        federation.await_closed(2)
        disk.fill()
        assert federation.server_ends() == ExitCode.FAILED
        said = federation.said(SERVER)
        assert "cannot be written" in said
        assert "No space left on device" in said
        assert "free disk space, then resume" in said
        assert federation.status_of_run == "failed"
        assert restore_newest(folder / "checkpoints").round_number >= 2
        disk.free()
        federation.resume()
        assert federation.server_ends() == ExitCode.COMPLETED
        every_round_once(folder, 4)
        nobody_was_charged_twice(folder, federation.names)
        federation.rehearsal.stop()


def test_a_full_disk_under_the_database_holds_the_run_up_until_there_is_room(tmp_path):
    folder = tmp_path / "run"
    with (
        operated(folder, rounds=8, settings=LONG_ENOUGH, starts=False) as federation,
        small_disk(federation.operator.state, megabytes=8) as disk,
    ):
        federation.start()
        federation.await_closed(2)
        disk.fill()
        log = federation.operator.superlink_log
        until(lambda: "database or disk is full" in log.read_text(), what="words about the full disk")
        time.sleep(10)
        assert federation.rehearsal.processes[SERVER].is_running
        at = max(closed(folder))
        time.sleep(5)
        assert max(closed(folder)) == at < 8, "nothing is asked that could not be kept"
        disk.free()
        assert federation.server_ends() == ExitCode.COMPLETED
        every_round_once(folder, 8)
        nobody_was_charged_twice(folder, federation.names)
        assert all(federation.rehearsal.processes[name].is_running for name in federation.names)
        federation.rehearsal.stop()
