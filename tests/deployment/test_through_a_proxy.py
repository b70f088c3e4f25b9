"""A hospital behind an HTTPS proxy that cuts connections idle for 10 s takes part like any other."""

import pytest

from common.exit_codes import ExitCode
from common.hospital_config import HospitalConfig
from common.settings import load, to_toml
from tests.client.small_servers import proxy
from tests.deployment.federation import every_round_once, metrics, prepared

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
BEHIND, BESIDE = "phantom-hospital-1", "phantom-hospital-2"


def test_a_hospital_behind_a_proxy_takes_part(tmp_path):
    folder = tmp_path / "run"
    with prepared(folder, hospitals=2, rounds=3) as rehearsal, proxy() as between:
        rehearsal.provision()
        path = rehearsal.hospital(BEHIND) / "hospital.toml"
        config = load(HospitalConfig, path)
        connection = config.connection.model_copy(update={"https_proxy": f"http://127.0.0.1:{between.port}"})
        path.write_text(to_toml(config.model_copy(update={"connection": connection})))
        rehearsal.launch()
        assert rehearsal.wait() is ExitCode.COMPLETED
        rehearsal.stop()
        asked = {head.splitlines()[0] for head in between.asked}
        fleet = rehearsal.ports["server"]["fleet"]
    assert asked == {f"CONNECT 127.0.0.1:{fleet} HTTP/1.1"}  # nothing but tunnels to the one open port
    every_round_once(folder, 3)
    outcomes = {(m["hospital"], m["outcome"]) for m in metrics(folder) if "hospital" in m}
    assert outcomes == {(BEHIND, "aggregated"), (BESIDE, "aggregated")}
