"""Hospitals that are too slow for a round: it closes without them, and what comes late counts nowhere."""

import os
import signal

import pytest

from client.ledger.ledger import Ledger
from common.exit_codes import ExitCode
from tests.deployment.federation import (
    charged_rounds,
    every_round_once,
    metrics,
    nobody_was_charged_twice,
    result,
    until,
)
from tests.deployment.operated import operated

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
DEADLINE_S = 12.0
LONG_ENOUGH = ("privacy.local-steps=12", f"server.deadline-s={DEADLINE_S}")
"""Rounds of about a second: there is time to stop somebody in the middle."""


def test_a_round_closes_at_its_deadline_and_a_late_update_is_dropped(tmp_path):
    folder = tmp_path / "run"
    with operated(folder, hospitals=3, rounds=5, settings=LONG_ENOUGH) as federation:
        _, worker_stops, supernode_stops = federation.names
        # Round 2: a worker stands still in training, past the deadline.
        until(lambda: (2, False) in charged_rounds(folder, worker_stops), what="round 2")
        stopped = federation.works(worker_stops, "worker_process")
        os.kill(stopped, signal.SIGSTOP)
        federation.await_closed(2)
        os.kill(stopped, signal.SIGCONT)
        # Round 4: a whole update is ready in time and cannot leave before the deadline.
        until(lambda: 3 in federation.outcomes(worker_stops), what="round 3 with everybody")
        until(lambda: (4, False) in charged_rounds(folder, supernode_stops), what="round 4")
        stopped = federation.works(supernode_stops, "supernode")
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: (4, True) in charged_rounds(folder, supernode_stops), what="its sealed update")
        federation.await_closed(4)
        os.kill(stopped, signal.SIGCONT)
        assert federation.server_ends() == ExitCode.COMPLETED
        late = [federation.outcomes(name) for name in (worker_stops, supernode_stops)]
    every_round_once(folder, 5)
    # Only rounds 2 and 4 are judged, and that they leave no trace; round 1 also warms everything up.
    for outcomes, stopped_in in zip(late, (2, 4), strict=True):
        assert [n for n, outcome in outcomes.items() if outcome != "aggregated" and n > 1] == [stopped_in]
        assert outcomes[stopped_in] == "late"
    for number in (2, 4):
        sent = [line["sent"] for line in metrics(folder) if line["round"] == number and "sent" in line]
        (at,) = [line["closed"] for line in metrics(folder) if line["round"] == number and "closed" in line]
        assert DEADLINE_S - 1 < at - min(sent) < DEADLINE_S + 5
    nobody_was_charged_twice(folder, federation.names)
    # Who was stopped in training charged the round and has no answer to it; the other has sealed one.
    assert {(2, False), (3, True)} <= set(charged_rounds(folder, worker_stops))
    assert {(4, True), (5, True)} <= set(charged_rounds(folder, supernode_stops))
    # Its cost is in what the server states: an epsilon covers everything that was charged before.
    for hospital in result(folder)["hospitals"]:
        ledger = Ledger.examine(folder / "hospitals" / hospital["name"] / "ledger")
        spent = ledger.spent(hospital["delta"]).epsilon
        assert spent * (1 - 1e-9) <= hospital["epsilon"] <= spent * 1.001
