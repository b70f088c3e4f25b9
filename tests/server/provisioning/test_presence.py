"""Who is connected, as the running server has noted it."""

import json
import subprocess
import sys
import time

import pytest

from server.provisioning.operator_config import OperatorFolder
from server.provisioning.presence import Presence, noted_presence

KEY = "SHA256:abc"
_HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    """The folder of a server that runs: another process holds its lock."""
    folder = OperatorFolder(tmp_path)
    folder.state.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder.lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        yield folder
        holder.stdin.close()


def note(folder, **changes):
    content = {
        "state": "running",
        "updated": time.time(),
        "presence": {KEY: {"online": True, "last_seen": 12.5}},
    }
    folder.server_json.write_text(json.dumps(content | changes))


def test_a_fresh_note_of_a_running_server_is_taken(folder):
    note(folder)
    assert noted_presence(folder) == {KEY: Presence(online=True, last_seen=12.5)}


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "ended"},
        {"updated": time.time() - 100},
        {"updated": time.time() + 100},
        {"updated": "now"},
        {"presence": None},
        {"presence": {KEY: {"on": True}}},
    ],
    ids=["ended", "old", "from the future", "no time", "nothing", "of another release"],
)
def test_any_other_note_is_not(folder, changes):
    note(folder, **changes)
    assert noted_presence(folder) is None


def test_without_a_note_or_a_running_server_there_is_none(folder, tmp_path):
    assert noted_presence(folder) is None
    other = OperatorFolder(tmp_path / "other")
    other.state.mkdir(parents=True)
    other.lock.touch()
    note(other)
    assert noted_presence(other) is None
