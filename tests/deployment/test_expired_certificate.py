"""The server's certificate expires while it is in use: hospitals say so and need nothing but its renewal."""

import subprocess

import pytest

from common.exit_codes import ExitCode
from common.flower_programs import python_module
from server.provisioning.certificates import days_left, issue_server_certificate
from simulations.engines.rehearsal import SERVER
from tests.deployment.federation import closed, nobody_was_charged_twice, until
from tests.deployment.operated import operated

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]
VALID_S = 60.0


def test_hospitals_say_that_the_certificate_has_expired_and_come_back_after_its_renewal(tmp_path):
    folder = tmp_path / "run"
    with operated(folder, rounds=400, settings=["privacy.local-steps=10"], starts=False) as federation:
        operator = federation.operator
        issue_server_certificate(
            operator.server_key,
            operator.server_certificate,
            authority_key=operator.ca_key,
            authority=operator.ca_certificate,
            names=["127.0.0.1", "localhost"],
            days=VALID_S / 86_400,
        )
        federation.start()
        federation.await_connected()
        assert days_left(operator.server_certificate) > 0, "this machine is too slow for this test"
        for name in federation.names:
            until(
                lambda name=name: "certificate" in federation.status(name).get("last_error", ""),
                patience_s=VALID_S + 60,
                what=f"{name}'s words",
            )
            assert "expired" in federation.said(name)
        # A server that is started with it says what to type, and does not run blind.
        # The server goes on while its own connections last; it ends with words when they do not.
        federation.kill(SERVER)
        before = max(closed(folder), default=0)
        federation.start(SERVER)
        assert federation.server_ends(within_s=120) in (ExitCode.FAILED, ExitCode.BAD_CONFIGURATION)
        assert "certificate" in federation.said(SERVER)
        renewed = python_module("server.cli", "renew", str(operator.path))
        subprocess.run(renewed, check=True, capture_output=True, timeout=60)
        federation.start(SERVER)
        until(lambda: max(closed(folder), default=0) > before + 2, patience_s=90, what="new rounds")
        federation.await_connected()
        assert all(federation.status(name)["last_error"] == "" for name in federation.names)
        federation.stop_the_run()
        assert federation.server_ends() == ExitCode.STOPPED
        assert all(federation.rehearsal.processes[name].is_running for name in federation.names)
    nobody_was_charged_twice(folder, federation.names)
