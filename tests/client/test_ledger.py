"""The ledger: durable, idempotent, exact over processes, and composed over patients."""

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from client.ledger.ledger import Ledger
from client.site_lock import site_lock
from common.errors import BudgetError, LedgerError, Refusal, RefusalCode
from common.messages import RoundKey
from common.privacy.accountant import epsilon, running_epsilon
from common.privacy.plan import PrivacyEvent

DELTA = 1e-4
FULL = PrivacyEvent(sampling_rate=1, noise_multiplier=30.0, steps=2)
HALF = PrivacyEvent(sampling_rate=0.5, noise_multiplier=9.0, steps=3)


def key(round_number=1, run_id="study", attempt=1, model_hash=None):
    return RoundKey(
        run_id=run_id,
        attempt=attempt,
        round_number=round_number,
        model_hash=model_hash or f"model-{round_number}",
    )


@pytest.fixture
def ledger(tmp_path):
    return Ledger.open(tmp_path / "ledger")


def people(ledger, first, last):
    return ledger.cohort(f"patient-{number}" for number in range(first, last))


def test_files_are_the_owners_alone(ledger):
    ledger.charge(key(), event=FULL, cohort=people(ledger, 0, 3), delta=DELTA)
    assert stat.S_IMODE(ledger.folder.stat().st_mode) == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in ledger.folder.iterdir()}
    assert set(files) == {"ledger.sqlite", "site.key", "head.json", "ledger.lock"}
    assert set(files.values()) == {0o600}


def test_nothing_that_names_a_patient_is_stored_or_printed(ledger):
    cohort = people(ledger, 0, 5)
    charge = ledger.charge(key(), event=FULL, cohort=cohort, delta=DELTA)
    content = b"".join(path.read_bytes() for path in ledger.folder.iterdir() if path.name != "site.key")
    assert b"patient-" not in content
    shown = repr(ledger) + repr(cohort) + repr(charge) + repr(ledger._store)
    assert ledger.site_key.hex() not in shown
    assert repr(ledger.site_key) not in shown
    assert all(repr(unit) not in shown for unit in cohort.hashes)


def test_a_charge_is_kept_and_read_back(ledger):
    cohort = people(ledger, 0, 5)
    charge = ledger.charge(
        key(), event=HALF, cohort=cohort, delta=DELTA, l2_clip_norm=0.7, unit="image", plan_digest="abc"
    )
    again = Ledger.open(ledger.folder)
    assert again.charges() == (charge,)
    assert again.find(key()) == charge
    assert again.find(key(2)) is None
    assert charge.event == HALF
    assert (charge.unit, charge.l2_clip_norm, charge.plan_digest) == ("image", 0.7, "abc")
    assert charge.epsilon == running_epsilon([HALF], delta=DELTA)


def test_the_same_key_is_charged_once(ledger):
    cohort = people(ledger, 0, 5)
    first = ledger.charge(key(), event=HALF, cohort=cohort, delta=DELTA)
    assert ledger.charge(key(), event=HALF, cohort=cohort, delta=DELTA) == first
    assert len(ledger.charges()) == 1
    for event, members, claims in (
        (FULL, cohort, True),
        (HALF, people(ledger, 0, 6), True),
        (HALF, cohort, False),
        (None, cohort, True),
    ):
        with pytest.raises(LedgerError, match="charged"):
            ledger.charge(key(), event=event, cohort=members, delta=DELTA, claims_privacy=claims)
    assert ledger.charges() == (first,)


def test_another_model_for_the_same_round_is_a_conflict(ledger):
    cohort = people(ledger, 0, 5)
    first = ledger.charge(key(), event=HALF, cohort=cohort, delta=DELTA)
    other = key(model_hash="tampered")
    assert ledger.conflict(key()) is None
    assert ledger.conflict(other) == first
    with pytest.raises(Refusal) as caught:
        ledger.charge(other, event=HALF, cohort=cohort, delta=DELTA)
    assert caught.value.code is RefusalCode.CONFLICT
    ledger.charge(key(attempt=2, model_hash="tampered"), event=HALF, cohort=cohort, delta=DELTA)
    assert len(ledger.charges()) == 2


def test_an_answer_is_sealed_once(ledger):
    with pytest.raises(LedgerError, match="without a charge"):
        ledger.mark_sealed(key(), "a" * 64)
    ledger.charge(key(), event=HALF, cohort=people(ledger, 0, 5), delta=DELTA)
    ledger.mark_sealed(key(), "a" * 64)
    ledger.mark_sealed(key(), "a" * 64)
    assert Ledger.open(ledger.folder).find(key()).sealed_sha256 == "a" * 64
    with pytest.raises(LedgerError, match="another sealed answer"):
        ledger.mark_sealed(key(), "b" * 64)


def test_overlapping_cohorts_compose_to_the_worst_patient(ledger):
    # Three runs against two servers; only patients 5..7 are in all three.
    events = {
        "a": PrivacyEvent(sampling_rate=0.5, noise_multiplier=6.0, steps=4),
        "b": PrivacyEvent(sampling_rate=0.2, noise_multiplier=2.0, steps=10),
        "c": PrivacyEvent(sampling_rate=1, noise_multiplier=20.0, steps=3),
    }
    cohorts = {"a": people(ledger, 0, 8), "b": people(ledger, 5, 12), "c": people(ledger, 3, 20)}
    for run in events:
        for number in (1, 2):
            ledger.charge(
                key(number, run), event=events[run], cohort=cohorts[run], delta=DELTA, recipient=run
            )
    spent = Ledger.open(ledger.folder).spent(DELTA)
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    for event in events.values():
        step = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        if event.sampling_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, step)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, 2 * event.steps))
    assert spent.epsilon == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-6)
    assert spent.private
    assert spent.patients == 20
    twice = [PrivacyEvent(**{**events["b"].to_dict(), "steps": 20})]
    assert {run.run_id: run.epsilon for run in spent.runs}["b"] == epsilon(twice, delta=DELTA)
    assert [run.rounds for run in spent.runs] == [2, 2, 2]


def test_histories_are_those_of_the_cohort_and_contained_ones_are_left_out(ledger):
    ledger.charge(key(1, "a"), event=HALF, cohort=people(ledger, 0, 4), delta=DELTA)
    ledger.charge(key(1, "b"), event=FULL, cohort=people(ledger, 2, 6), delta=DELTA)
    assert ledger.histories(people(ledger, 100, 110)) == [()]
    assert ledger.histories(people(ledger, 0, 2)) == [(HALF,)]
    assert sorted(len(history) for history in ledger.histories(people(ledger, 0, 6))) == [2]
    apart = ledger.cohort(["patient-0", "patient-5"])
    assert sorted(ledger.histories(apart), key=str) == sorted([(HALF,), (FULL,)], key=str)


def test_disjoint_cohorts_do_not_add_up(ledger):
    ledger.charge(key(1, "a"), event=HALF, cohort=people(ledger, 0, 4), delta=DELTA)
    ledger.charge(key(1, "b"), event=HALF, cohort=people(ledger, 4, 8), delta=DELTA)
    assert ledger.spent(DELTA).epsilon == epsilon([HALF], delta=DELTA)


def test_a_limit_is_kept_in_the_same_transaction(ledger):
    cohort = people(ledger, 0, 5)
    limit = epsilon([HALF, HALF], delta=DELTA)
    for number in (1, 2):
        charge = ledger.charge(key(number), event=HALF, cohort=cohort, delta=DELTA, limit=limit)
        assert charge.epsilon <= limit
    with pytest.raises(BudgetError) as caught:
        ledger.charge(key(3), event=HALF, cohort=cohort, delta=DELTA, limit=limit)
    assert caught.value.refusal is RefusalCode.BUDGET
    told = str(caught.value)
    for words in (
        "used: epsilon ",
        f"of the limit {limit:g}",
        "asked: ",
        "would make it",
        "never for these patients",
    ):
        assert words in told
    assert len(ledger.charges()) == 2
    # Others are not concerned, and the ledger is whole after the refusal.
    ledger.charge(key(3), event=HALF, cohort=people(ledger, 50, 60), delta=DELTA, limit=limit)
    assert len(Ledger.open(ledger.folder).charges()) == 3


def test_training_without_privacy_is_said_in_words(ledger):
    ledger.charge(key(1, "dp"), event=HALF, cohort=people(ledger, 0, 4), delta=DELTA)
    assert ledger.spent(DELTA).private
    ledger.charge(key(1, "open"), event=None, cohort=people(ledger, 2, 5), delta=DELTA)
    rehearsal = ledger.charge(
        key(1, "rehearsal"), event=HALF, cohort=people(ledger, 4, 6), delta=DELTA, claims_privacy=False
    )
    assert rehearsal.epsilon is None
    spent = ledger.spent(DELTA)
    assert spent.private is False
    assert spent.not_private_patients == 4
    assert spent.epsilon == epsilon([HALF], delta=DELTA)
    assert "4 patient(s) also took part in training that claims no privacy" in spent.in_words()
    assert {run.run_id: run.epsilon is None for run in spent.runs} == {
        "dp": False,
        "open": True,
        "rehearsal": True,
    }


def test_a_rehearsal_counts_for_its_own_decisions_only(ledger):
    cohort = people(ledger, 0, 4)
    limit = epsilon([HALF], delta=DELTA)
    charged = {"event": HALF, "cohort": cohort, "delta": DELTA, "claims_privacy": False, "limit": limit}
    ledger.charge(key(1, "rehearsal"), **charged)
    assert ledger.histories(cohort) == [()]
    assert ledger.histories(cohort, rehearsed_run="rehearsal") == [(HALF,)]
    with pytest.raises(BudgetError):
        ledger.charge(key(2, "rehearsal"), **charged)
    ledger.charge(key(1, "real"), **{**charged, "claims_privacy": True})


def test_an_empty_ledger_has_spent_nothing(ledger):
    spent = ledger.spent(DELTA)
    assert (spent.epsilon, spent.patients, spent.runs) == (0.0, 0, ())
    assert ledger.verify() == []


def test_the_site_key_survives_and_recognises_patients(ledger, tmp_path):
    again = Ledger.open(ledger.folder)
    assert again.site_key == ledger.site_key
    assert len(again.site_key) == 32
    assert again.cohort(["a", "b"]) == ledger.cohort(["b", "a"])
    other = Ledger.open(tmp_path / "elsewhere")
    assert other.site_key != ledger.site_key
    assert not other.cohort(["a", "b"]).hashes & ledger.cohort(["a", "b"]).hashes


def _charge_many(folder, run_id, count, failures):
    try:
        ledger = Ledger.open(folder)
        cohort = people(ledger, 0, 3)
        for number in range(1, count + 1):
            ledger.charge(key(number, run_id), event=FULL, cohort=cohort, delta=DELTA)
    except BaseException as error:  # the parent must see it
        failures.put(repr(error))
        raise


def test_two_processes_charging_a_hundred_times_each_are_exact(tmp_path):
    folder = tmp_path / "ledger"
    Ledger.open(folder)
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    workers = [context.Process(target=_charge_many, args=(folder, run, 100, failures)) for run in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    failures.close()
    failures.join_thread()
    ledger = Ledger.open(folder)
    assert len(ledger.charges()) == 200
    whole = PrivacyEvent(sampling_rate=1, noise_multiplier=30.0, steps=400)
    assert ledger.spent(DELTA).epsilon == epsilon([whole], delta=DELTA)


CHARGING = """
import sys
from pathlib import Path
from client.ledger.ledger import Ledger
from common.messages import RoundKey
from common.privacy.plan import PrivacyEvent
ledger = Ledger.open(Path(sys.argv[1]))
cohort = ledger.cohort(["a", "b", "c"])
start = len(ledger.charges())
for number in range(start + 1, 10_000):
    key = RoundKey(run_id="run", attempt=1, round_number=number, model_hash="m")
    event = PrivacyEvent(sampling_rate=1, noise_multiplier=50.0, steps=1)
    ledger.charge(key, event=event, cohort=cohort, delta=1e-4, claims_privacy=False)
    print(number, flush=True)
    ledger.mark_sealed(key, "s" * 64)
"""


def test_killed_between_and_within_charges_nothing_acknowledged_is_lost(tmp_path):
    folder = tmp_path / "ledger"
    Ledger.open(folder)
    for attempt in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", CHARGING, str(folder)], stdout=subprocess.PIPE, text=True
        )
        acknowledged = int(child.stdout.readline())
        time.sleep(0.05 + 0.013 * attempt)
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
        child.wait(timeout=30)
        child.stdout.close()
        acknowledged = int(rest[-1]) if rest else acknowledged
        charges = Ledger.open(folder).charges()
        assert len(charges) in (acknowledged, acknowledged + 1)
        assert sum(charge.sealed_sha256 is not None for charge in charges) <= len(charges)
        assert Ledger.examine(folder).verify() == []


def test_a_crash_between_commit_and_head_is_caught_up(ledger, monkeypatch):
    cohort = people(ledger, 0, 3)
    ledger.charge(key(1), event=FULL, cohort=cohort, delta=DELTA)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ledger._store, "_write_head", crash)
        with pytest.raises(KeyboardInterrupt):
            ledger.charge(key(2), event=FULL, cohort=cohort, delta=DELTA)
    assert Ledger.examine(ledger.folder).verify() == []
    assert len(Ledger.open(ledger.folder).charges()) == 2
    again = Ledger.open(ledger.folder)
    assert again.charge(key(2), event=FULL, cohort=cohort, delta=DELTA).number == 2
    again.charge(key(3), event=FULL, cohort=cohort, delta=DELTA)
    assert again.verify() == []


def test_a_crash_while_the_ledger_is_made_leaves_no_dead_end(tmp_path, monkeypatch):
    from client.ledger import store as ledger_store

    def crash(*_, **__):
        raise KeyboardInterrupt

    folder = tmp_path / "ledger"
    with monkeypatch.context() as patched:
        patched.setattr(ledger_store, "write_bytes_atomically", crash)
        with pytest.raises(KeyboardInterrupt):
            Ledger.open(folder)
    assert not (folder / "site.key").exists()
    ledger = Ledger.open(folder)
    ledger.charge(key(), event=FULL, cohort=people(ledger, 0, 2), delta=DELTA)
    assert ledger.verify() == []


def test_a_fork_can_charge_with_its_parents_ledger(ledger):
    cohort = people(ledger, 0, 3)
    ledger.charge(key(1), event=FULL, cohort=cohort, delta=DELTA)
    child = subprocess.run(
        [sys.executable, "-c", FORKING, str(ledger.folder)], check=True, timeout=60, capture_output=True
    )
    assert child.stdout.decode().split() == ["3"]


FORKING = """
import os, sys
from pathlib import Path
from client.ledger.ledger import Ledger
from common.messages import RoundKey
ledger = Ledger.open(Path(sys.argv[1]))
cohort = ledger.cohort(["x"])
def charge(number):
    key = RoundKey(run_id="fork", attempt=1, round_number=number, model_hash="m")
    ledger.charge(key, event=None, cohort=cohort, delta=1e-4)
child = os.fork()
charge(1 if child else 2)
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(len(ledger.charges()))
"""


def test_the_site_lock_is_exclusive_and_dies_with_its_holder(tmp_path):
    with site_lock(tmp_path):
        assert stat.S_IMODE((tmp_path / "site.lock").stat().st_mode) == 0o600
        started = time.monotonic()
        with pytest.raises(LedgerError, match="held the lock") as caught, site_lock(tmp_path, timeout_s=0.1):
            pytest.fail("two holders")
        assert time.monotonic() - started >= 0.1
        assert caught.value.refusal is RefusalCode.LEDGER
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LedgerError), site_lock(tmp_path, timeout_s=0.05):
        pytest.fail("two holders")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(timeout=30)
    holder.stdout.close()
    with site_lock(tmp_path, timeout_s=5):
        pass


HOLDING = """
import sys, time
from pathlib import Path
from client.site_lock import site_lock
with site_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
