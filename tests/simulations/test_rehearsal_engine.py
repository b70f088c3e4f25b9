"""When the rehearsal engine starts a process again, and when it says that there is no use."""

import json
import sys

import pytest

from common.child_process import ChildProcess
from common.config import FederationConfig
from common.errors import FederationError
from common.settings import parse
from simulations.engines import rehearsal as engine
from simulations.engines.rehearsal import SERVER, Rehearsal


@pytest.fixture
def rehearsal(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_RESTART_AFTER_S", 0.0)
    config = parse(FederationConfig, {"runtime": {"run-folder": str(tmp_path)}}, source="test")
    with Rehearsal(config, hospitals=()) as made:
        made.ports = {SERVER: {}}
        yield made


def serves(rehearsal, script):
    log = rehearsal.folder / "logs" / "process.log"
    rehearsal.processes[SERVER] = ChildProcess([sys.executable, "-c", script], log=log, name=SERVER)
    rehearsal.processes[SERVER].start()


def test_a_server_whose_run_has_failed_is_an_end_with_its_last_words(rehearsal):
    result = rehearsal.folder / "result.json"
    content = json.dumps({"status": "failed"})
    serves(
        rehearsal, f"open({str(result)!r}, 'w').write({content!r}); print('the words'); raise SystemExit(1)"
    )
    with pytest.raises(FederationError, match="ended with status 1") as ended:
        rehearsal.wait()
    assert ended.value.why == "the words"


def test_a_server_that_died_before_a_result_is_started_again(rehearsal):
    mark = rehearsal.folder / "once"
    serves(
        rehearsal,
        f"import pathlib; p = pathlib.Path({str(mark)!r})\n"
        "status = 0 if p.exists() else 1\np.touch(); raise SystemExit(status)",
    )
    assert rehearsal.wait() == 0
    assert mark.exists()
