"""Every byte between a hospital and the server, caught on the way: nothing of it can be read."""

import numpy as np
import pytest

from common.exit_codes import ExitCode
from common.parameters import read_safetensors
from tests.deployment.federation import go_through, prepared, result
from tests.deployment.relay import Cable

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


def test_captured_traffic_holds_no_plaintext(tmp_path):
    folder = tmp_path / "run"
    with prepared(folder, hospitals=2, rounds=2) as rehearsal:
        rehearsal.provision()
        with Cable(("127.0.0.1", rehearsal.ports["server"]["fleet"])) as cable:
            for name in ("phantom-hospital-1", "phantom-hospital-2"):
                go_through(rehearsal, name, cable.port)
            rehearsal.launch()
            assert rehearsal.wait() is ExitCode.COMPLETED
            rehearsal.stop()
            caught = bytes(cable.passed)
    assert len(caught) > 4 * result(folder)["wire"]["bytes_up"] / 2
    words = ["phantom-hospital", "enrolled-patients", "opacity", "normal", "safetensors", "envelope"]
    words += ["output.bias", "parameters", "epsilon", "/v1/fleet", "hospital-federation"]
    assert [word for word in words if word.encode() in caught] == []
    model = read_safetensors(folder / "model.safetensors")
    initial = read_safetensors(folder / "checkpoints" / "1" / "model.safetensors")
    for weights in (model, initial):
        for array in weights.values():
            row = np.ascontiguousarray(array, dtype="<f4").tobytes()[:32]
            assert len(row) < 16 or row not in caught
