"""What hospitals state against what their updates cost: a ledger lost in mid-run claims too little."""

import json
from dataclasses import asdict, replace

import pytest

from common import messages
from common.config import FederationConfig
from common.errors import RefusalCode
from common.messages import Envelope
from common.privacy.accountant import epsilon_prv
from common.privacy.plan import PrivacyEvent
from common.settings import parse
from server.recount import recounted
from server.reporting.privacy_statement import privacy_statement
from server.reporting.run_record import read_run
from server.totals import HospitalTotals, OpenQuestion, totals_from
from tests.server.fake_federation import (
    FakeGrid,
    in_round,
    make_config,
    refuse,
    result_of,
    run,
    three_hospitals,
)

DELTA, Q = 1e-3, 0.5


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def cost(*kinds, delta=DELTA, q=Q):
    """By Opacus' PRV accountant, which is another program than the one that counts."""
    events = [PrivacyEvent(sampling_rate=q, noise_multiplier=noise, steps=steps) for noise, steps in kinds]
    return epsilon_prv(events, delta=delta)


def stating(change):
    """Let training answers state the epsilon that `change` makes of their round's number."""

    def tamper(reply, request):
        if request.metadata.message_type == messages.TRAIN:
            number = Envelope.from_record(request.content).key.round_number
            reply.content[messages.METRICS]["epsilon"] = change(number)
        return reply

    return tamper


def entry(folder, name):
    return next(h for h in result_of(folder)["hospitals"] if h["name"] == name)


HONEST = {number: cost((4.0, 2 * number)) + 0.02 for number in (1, 2, 3)}
"""Two steps with noise multiplier 4 in each round."""


def test_a_ledger_begun_anew_in_mid_run_does_not_lower_what_stands(folder, caplog):
    begun_anew = stating(lambda number: HONEST[1 if number == 3 else number])
    only_last = stating(lambda number: HONEST[1])
    hospitals = three_hospitals(a=stating(HONEST.get), b=begun_anew, c=only_last)
    run(make_config(folder), FakeGrid(hospitals))
    a, b, c = (entry(folder, name) for name in "abc")
    assert (a["epsilon"], a["epsilon_complete"], a["epsilon_understated"]) == (HONEST[3], True, False)
    for wrong in (b, c):
        assert wrong["epsilon"] == pytest.approx(cost((4.0, 6)), abs=0.02)
        assert (wrong["epsilon_complete"], wrong["epsilon_understated"]) == (False, True)
        assert wrong["epsilon_outsider"] == wrong["epsilon"]
    told = [line for line in caplog.text.splitlines() if "lost charges from its ledger" in line]
    assert [line.split(" states ")[0].split()[-1] for line in told] == ["b", "c"]
    privacy = json.loads((folder / "model.json").read_text())["privacy"]
    assert (privacy["epsilon"], privacy["epsilon_complete"]) == (None, False)
    statement = privacy_statement(read_run(folder))
    assert "is not known here" in statement.headline
    assert "What b, c stated is less than the updates cost" in statement.explanation
    assert "may have been formed" not in statement.explanation


def test_the_sum_goes_on_over_a_resume_and_counts_no_update_twice(folder):
    low = stating(lambda number: HONEST[1])
    missing = dict.fromkeys("ab", in_round(3, refuse(RefusalCode.POLICY)))
    run(make_config(folder), FakeGrid(three_hospitals(**missing, c=low)))
    assert result_of(folder)["status"] == "quorum-lost"
    assert entry(folder, "c")["epsilon_understated"] is True
    kept = json.loads((folder / "spent.json").read_text())["hospitals"]["c"]
    assert (kept["kinds"], kept["understated"], kept["epsilon"]) == ([[4.0, 6]], False, HONEST[1])
    run(make_config(folder), FakeGrid(three_hospitals(c=low)))
    assert entry(folder, "c")["releases"] == 3
    assert entry(folder, "c")["epsilon"] == pytest.approx(cost((4.0, 6)), abs=0.02)


def test_files_of_an_earlier_release_are_read():
    known = HospitalTotals(enrolled_patients=100, epsilon=0.5, delta=DELTA, counted=("1/1/ab",))
    old = {name: value for name, value in asdict(known).items() if name not in ("kinds", "understated")}
    assert totals_from(old) == known
    with_kinds = replace(known, kinds=((4.0, 6), (5.0, 2)))
    assert totals_from(json.loads(json.dumps(asdict(with_kinds)))) == with_kinds


def totals_after(noise_of_rounds, *, epsilon):
    totals = HospitalTotals(enrolled_patients=100)
    for number, noise in enumerate(noise_of_rounds, start=1):
        question = OpenQuestion(key=f"1/{number}/ab", asked=float(number), until=number + 0.5)
        stated = {"steps": 1.0, "epsilon": epsilon, "delta": DELTA, "noise-multiplier": noise}
        totals = totals.asked(question).released(question, stated, planned_steps=1)
    return totals


def counted(totals, **federation):
    values = {"privacy": {"sampling-rate": Q}, "federation": federation}
    return recounted(parse(FederationConfig, values, source="test"), {"a": totals})["a"]


def test_different_noise_is_composed_kind_by_kind():
    totals = totals_after([4.0, 5.0, 4.0], epsilon=0.01)
    assert totals.kinds == ((4.0, 2), (5.0, 1))
    assert counted(totals).epsilon == pytest.approx(cost((4.0, 2), (5.0, 1)), abs=0.02)


def test_many_kinds_stay_few_and_accuse_nobody():
    noise = [4.0 + 0.01 * number for number in range(10)]
    honest = cost(*[(sigma, 1) for sigma in noise])
    totals = totals_after(noise, epsilon=honest)
    assert len(totals.kinds) == 8
    assert sum(steps for _, steps in totals.kinds) == 10
    assert counted(totals) == totals
    low = counted(replace(totals, epsilon=honest / 2))
    assert low.understated
    assert 0.9 * honest < low.epsilon < honest


@pytest.mark.parametrize(
    ("kinds", "delta"), [(((1e-6, 10**9),), 1e-3), (((4.0, 90),), 1e-300), (((0.1, 10**9),), 1e-12)]
)
def test_a_wild_statement_costs_neither_memory_nor_the_run(kinds, delta):
    totals = HospitalTotals(enrolled_patients=100, epsilon=1.0, delta=delta, kinds=kinds)
    found = counted(totals)
    assert (found.epsilon, found.epsilon_complete) == (1.0, False)


@pytest.mark.parametrize("claims", [{"private": False}, {"reproducible": True}])
def test_without_a_claim_nothing_is_recounted(claims):
    totals = totals_after([4.0, 4.0], epsilon=0.01)
    assert counted(totals, **claims) == totals
