"""A hospital with another release connects, is not asked to train, and both sides can read why."""

import os
import subprocess

import pytest

from common.exit_codes import ExitCode
from common.flower_programs import ROOT, python_module
from tests.deployment.federation import charged_rounds, closed, until
from tests.deployment.operated import operated

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]
OTHER = """
import importlib.metadata
known = importlib.metadata.version
importlib.metadata.version = lambda name: "9.9.9" if name == "hospital-federation" else known(name)
"""
"""What stands in for an installation of another release: Python runs it at the start of every process."""


def test_a_hospital_of_another_release_is_not_asked_and_both_sides_say_why(tmp_path):
    folder, patch = tmp_path / "run", tmp_path / "other-release"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(OTHER)
    path = os.pathsep.join([str(patch), str(ROOT)])
    with operated(
        folder, hospitals=2, rounds=2, settings=["server.patience-s=20"], starts=False
    ) as federation:
        same, other = federation.names
        federation.set_up(other, environment={"PYTHONPATH": path})
        federation.start()
        log = federation.operator.federation_log
        until(
            lambda: (
                log.exists() and f"{other} runs another release of hospital-federation" in log.read_text()
            ),
            what="the server's words",
        )
        assert federation.status(other)["connected"], "it is let in, and not asked"
        # What the hospital's person sees, while the server is up: `flower-client check`.
        check = subprocess.run(
            python_module("client.cli", "check", str(federation.rehearsal.hospital(other))),
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert federation.server_ends() == ExitCode.COMPLETED
        assert federation.outcomes(other) == {}
        assert set(federation.outcomes(same).values()) == {"aggregated"}
    assert closed(folder) == [1, 2]
    assert charged_rounds(folder, other) == []
    assert len(charged_rounds(folder, same)) == 2
    assert "9.9.9" in check.stdout, check.stdout + check.stderr
