"""One byte of the newest checkpoint flips while the server is down: it says so and asks that round again."""

import json

import pytest

from common.exit_codes import ExitCode
from simulations.engines.rehearsal import SERVER
from tests.deployment.federation import closed, every_round_once, metrics, nobody_was_charged_twice
from tests.deployment.operated import operated

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]


def test_a_flipped_byte_in_the_newest_checkpoint_costs_one_round_and_no_privacy(tmp_path):
    folder = tmp_path / "run"
    with operated(folder, rounds=5, settings=["privacy.local-steps=15"]) as federation:
        federation.await_closed(3)
        federation.await_training()
        federation.kill(SERVER)
        newest = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
        assert newest == closed(folder)[-1] >= 3
        model = folder / "checkpoints" / str(newest) / "model.safetensors"
        content = bytearray(model.read_bytes())
        content[-100] ^= 1
        model.write_bytes(content)
        before = {line["round"]: line["model_sha256"] for line in metrics(folder) if "closed" in line}
        federation.start(SERVER)
        assert federation.server_ends() == ExitCode.COMPLETED
        log = federation.operator.federation_log.read_text()
        said = federation.said(SERVER)
    assert f"checkpoint {newest} is passed over: model.safetensors" in log
    assert f"the run goes on after round {newest - 1}" in log
    assert json.loads((folder / "result.json").read_text())["status"] == "completed", said
    every_round_once(folder, 5)
    nobody_was_charged_twice(folder, federation.names)
    # The sealed answers gave the same model again.
    after = {line["round"]: line["model_sha256"] for line in metrics(folder) if "closed" in line}
    assert after[newest] == before[newest]
