"""Composition `site`: who took part before decides neither noise nor refusal, and the cost is never less."""

import pytest

from client.ledger.ledger import Ledger
from client.ledger.records import EVALUATION, EVERYBODY
from client.ledger.store import LedgerStore
from common.errors import BudgetError
from common.messages import RoundKey
from common.privacy.accountant import epsilon, merge
from common.privacy.calibration import solve_noise_multiplier
from common.privacy.plan import PrivacyEvent

DELTA = 1e-4
EVENT = PrivacyEvent(sampling_rate=1, noise_multiplier=12.0, steps=3)
OTHER = PrivacyEvent(sampling_rate=1, noise_multiplier=15.0, steps=4)
COUNTS = PrivacyEvent(sampling_rate=1, noise_multiplier=6.0, steps=1)


def key(number, run_id):
    return RoundKey(run_id=run_id, attempt=1, round_number=number, model_hash=f"m{number}")


@pytest.fixture
def ledger(tmp_path):
    return Ledger.open(tmp_path / "ledger")


def people(ledger, first, last):
    return ledger.cohort(f"patient-{number}" for number in range(first, last))


def test_a_patient_with_a_past_changes_nothing_for_those_without(ledger):
    ledger.charge(key(1, "old"), event=EVENT, cohort=people(ledger, 0, 4), delta=DELTA)
    without, neighbour = (
        people(ledger, 10, 20),
        ledger.cohort([*(f"patient-{number}" for number in range(10, 20)), "patient-0"]),
    )

    def noise(cohort, composition):
        return solve_noise_multiplier(
            histories=ledger.histories(cohort, composition=composition),
            sampling_rate=1,
            steps=10,
            epsilon=3.0,
            delta=DELTA,
        )

    assert noise(without, "site") == noise(neighbour, "site") == noise(neighbour, "patient")
    assert noise(without, "patient") < noise(neighbour, "patient")  # what `site` is there to hide


def test_refusals_go_by_everything_that_was_charged(ledger):
    limit = epsilon([EVENT, OTHER], delta=DELTA)
    ledger.charge(key(1, "a"), event=EVENT, cohort=people(ledger, 0, 4), delta=DELTA, limit=limit)
    ledger.charge(
        key(1, "b"), event=OTHER, cohort=people(ledger, 4, 8), delta=DELTA, limit=limit, composition="site"
    )
    asked = {"event": COUNTS, "cohort": people(ledger, 50, 60), "delta": DELTA, "limit": limit}
    with pytest.raises(BudgetError):
        ledger.charge(key(1, "c"), **asked, composition="site")
    ledger.charge(key(1, "c"), **asked, composition="patient")
    assert ledger.verify() == []


def test_validation_patients_count_like_all_others(ledger):
    ledger.charge(key(1, "a"), event=EVENT, cohort=people(ledger, 0, 4), delta=DELTA)
    ledger.charge(key(1, "a"), event=COUNTS, cohort=people(ledger, 4, 8), delta=DELTA, purpose=EVALUATION)
    (history,) = ledger.histories(people(ledger, 90, 99), composition="site")
    assert merge(history) == merge([EVENT, COUNTS])
    spent = ledger.spent(DELTA)
    (run,) = spent.runs
    assert (run.rounds, run.steps, run.evaluations) == (1, EVENT.steps, 1)
    assert run.noise_multiplier == EVENT.noise_multiplier


def test_a_rehearsal_counts_for_its_own_run_alone(ledger):
    cohort = people(ledger, 0, 4)
    ledger.charge(key(1, "open"), event=EVENT, cohort=cohort, delta=DELTA, claims_privacy=False)
    assert ledger.histories(people(ledger, 9, 12), composition="site") == [()]
    assert ledger.histories(people(ledger, 9, 12), rehearsed_run="open", composition="site") == [(EVENT,)]


def test_a_run_whose_patients_change_states_the_cost_of_all_its_rounds(ledger):
    for number, (first, last) in enumerate([(0, 4), (4, 8)], start=1):
        ledger.charge(
            key(number, "a"),
            event=EVENT,
            cohort=people(ledger, first, last),
            delta=DELTA,
            composition="site",
        )
    twice = epsilon([EVENT, EVENT], delta=DELTA)
    assert ledger.charges()[-1].epsilon == pytest.approx(twice, rel=5e-3)
    assert ledger.verify() == []
    spent = ledger.spent(DELTA)
    assert (spent.epsilon, spent.site_epsilon) == (epsilon([EVENT], delta=DELTA), twice)
    assert "as if every patient had been in every run" in spent.in_words()


def test_where_all_took_part_in_all_nothing_more_is_said(ledger):
    ledger.charge(key(1, "a"), event=EVENT, cohort=people(ledger, 0, 4), delta=DELTA)
    spent = ledger.spent(DELTA)
    assert spent.site_epsilon == spent.epsilon
    assert "as if" not in spent.in_words()


def test_what_everybody_was_charged_reaches_those_to_come(ledger):
    ledger.charge(key(1, "a"), event=EVENT, cohort=people(ledger, 0, 4), delta=DELTA)
    ledger.charge_everybody([OTHER], delta=DELTA, up_to=7, head="f" * 64)
    assert [merge(h) for h in ledger.histories(people(ledger, 90, 91))] == [merge([OTHER])]
    assert [merge(h) for h in ledger.histories(people(ledger, 0, 1))] == [merge([EVENT, OTHER])]
    assert ledger.spent(DELTA).epsilon == epsilon([EVENT, OTHER], delta=DELTA)
    assert Ledger.open(ledger.folder).verify() == []


def test_members_of_everybody_cannot_be_written_in(ledger):
    ledger.charge_everybody([OTHER], delta=DELTA)
    store = LedgerStore(ledger.folder)
    with store.examining() as connection:
        connection.execute(
            "UPDATE cohorts SET size = 1, members = ? WHERE digest = ?", (b"x" * 32, EVERYBODY)
        )
        assert [finding.kind for finding in store.problems(connection)] == ["cohort"]
