"""Paused and left: two small files, also of another owner."""

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from client.provisioning import standing


def test_a_pause_has_a_beginning_and_an_end(tmp_path):
    assert not standing.is_paused(tmp_path)
    assert standing.since(tmp_path, standing.PAUSED) == ""
    assert standing.pause(tmp_path)
    assert standing.is_paused(tmp_path)
    assert standing.since(tmp_path, standing.PAUSED)[:4] == str(datetime.now(UTC).year)
    assert standing.unpause(tmp_path)
    assert not standing.is_paused(tmp_path)


@pytest.fixture
def denied(monkeypatch):
    """PermissionError for these methods of a path, as for a file of another owner, also for root."""

    def deny(*names):
        def refuse(self, *_, **__):
            raise PermissionError(13, "Permission denied", str(self))

        for name in names:
            monkeypatch.setattr(Path, name, refuse)

    return deny


def test_a_file_of_another_owner_still_tells_since_when(tmp_path, denied):
    standing.leave(tmp_path)
    os.utime(tmp_path / "left", (1_900_000_000, 1_900_000_000))
    denied("read_text")
    assert standing.since(tmp_path, standing.LEFT) == "2030-03-17T17:46:40+00:00"
    assert standing.has_left(tmp_path)


def test_what_cannot_even_be_looked_at_refuses_rounds(tmp_path, denied):
    denied("read_text", "stat", "exists")
    assert standing.is_paused(tmp_path)
    assert standing.has_left(tmp_path)
    assert standing.since(tmp_path, standing.PAUSED) == "an unknown time"


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes files of another owner")
def test_a_pause_by_root_is_seen_by_the_clients_own_user():
    with tempfile.TemporaryDirectory() as name:
        state = Path(name)
        state.chmod(0o755)
        standing.pause(state)
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            fine = standing.is_paused(state) and standing.since(state, standing.PAUSED)
            os._exit(0 if fine else 1)
        assert os.waitpid(child, 0)[1] == 0
