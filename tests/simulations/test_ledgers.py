"""A simulation states what its hospitals were charged, not only what its server heard of."""

import json

from client.ledger.ledger import Ledger
from common.messages import RoundKey
from common.privacy.plan import PrivacyEvent
from simulations.ledgers import charged, collect_audit

EVENT = PrivacyEvent(sampling_rate=1.0, noise_multiplier=20.0, steps=2)


def charge(folder, *, rounds, run_id="run", claims=True, sealed=()):
    ledger = Ledger.open(folder / "hospitals" / "north" / "ledger")
    cohort = ledger.cohort(["a", "b"])
    for number in rounds:
        key = RoundKey(run_id=run_id, attempt=1, round_number=number, model_hash=f"{number:064d}")
        ledger.charge(key, event=EVENT, cohort=cohort, delta=1e-3, claims_privacy=claims)
        if number in sealed:
            ledger.mark_sealed(key, "f" * 64)
    return ledger


def test_every_charge_of_the_run_counts_also_one_that_was_never_answered(tmp_path):
    ledger = charge(tmp_path, rounds=(1, 2, 3), sealed=(1, 2))
    charge(tmp_path, rounds=(1,), run_id="another")
    found = charged(tmp_path, "north", "run")
    assert (found["steps"], found["releases"], found["delta"]) == (6, 2, 1e-3)
    assert found["epsilon"] == ledger.charges()[2].epsilon
    assert found["epsilon_complete"] is True


def test_nothing_is_claimed_for_a_run_without_privacy_or_without_a_ledger(tmp_path):
    assert charged(tmp_path, "north", "run") == {}
    charge(tmp_path, rounds=(1,), claims=False)
    assert charged(tmp_path, "north", "run") == {}


def test_what_left_the_hospitals_stands_in_one_file_by_time(tmp_path):
    for name, times in (("north", (1.0, 4.0)), ("south", (2.0,))):
        state = tmp_path / "hospitals" / name / "state"
        state.mkdir(parents=True)
        lines = (json.dumps({"time": time, "what": "update"}) for time in times)
        (state / "audit.jsonl").write_text("".join(line + "\n" for line in lines))
    collect_audit(tmp_path, ["north", "south", "never-asked"])
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["time"], line["hospital"]) for line in lines] == [(1, "north"), (2, "south"), (4, "north")]
