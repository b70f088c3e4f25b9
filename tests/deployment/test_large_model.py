"""A model of 100 MB between real processes, with requests of 16 MB at most."""

import ssl

import httpx
import pytest

from common.exit_codes import ExitCode
from common.parameters import read_safetensors
from simulations.engines.rehearsal import SERVER
from tests.deployment.federation import charged_rounds, every_round_once, nobody_was_charged_twice, until
from tests.deployment.operated import operated

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
PLAIN = {"model": "cnn-flatten", "image_size": 160, "private": False}
SETTINGS = ["privacy.local-steps=1", "training.learning-rate=0.01"]
SETTINGS += ["training.physical-batch-size=16", "training.batch-size=16"]


def test_a_model_of_100_mb_goes_through_and_one_object_of_20_mb_does_not(tmp_path):
    folder = tmp_path / "run"
    with operated(folder, rounds=1, settings=SETTINGS, **PLAIN) as federation:
        assert "max-body-mb = 16" in federation.operator.federation_toml.read_text()
        until(lambda: "hospitals may connect" in federation.said(SERVER), what="the open path")
        context = ssl.create_default_context(cafile=str(federation.operator.ca_certificate))
        address = f"https://127.0.0.1:{federation.port}/v1/fleet/push-object"
        headers = {"content-type": "application/protobuf"}
        with httpx.Client(verify=context, trust_env=False, timeout=30) as client:
            assert client.post(address, content=bytes(20 * 2**20), headers=headers).status_code == 413
            assert client.post(address, content=bytes(15 * 2**20), headers=headers).status_code != 413
        assert federation.server_ends() == ExitCode.COMPLETED
    every_round_once(folder, 1)
    weights = read_safetensors(folder / "model.safetensors")
    assert sum(array.nbytes for array in weights.values()) > 100e6
    for name in federation.names:
        assert federation.outcomes(name) == {1: "aggregated"}
        received = list((folder / "hospitals" / name / "state" / "models").glob("*/model.safetensors"))
        assert len(received) == 1
        assert received[0].stat().st_size > 100e6


def test_a_server_killed_while_hospitals_receive_a_message_is_not_waited_for(tmp_path):
    """The task is offered before all of its 20 pieces are there; then they never come."""
    folder = tmp_path / "run"
    with operated(folder, rounds=2, settings=[*SETTINGS, "server.quorum=2"], **PLAIN) as federation:

        def receiving(name):
            log = federation.rehearsal.hospital(name) / "logs" / "supernode.log"
            said = log.read_text(errors="replace") if log.exists() else ""
            return "Receiving: train" in said.rpartition("Received successfully")[2]

        until(lambda: all(receiving(name) for name in federation.names), what="pieces on their way")
        federation.kill(SERVER)
        assert all(charged_rounds(folder, name) == [] for name in federation.names)
        federation.start(SERVER)
        assert federation.server_ends(within_s=200) == ExitCode.COMPLETED
    every_round_once(folder, 2)
    nobody_was_charged_twice(folder, federation.names)
