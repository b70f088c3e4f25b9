"""What hospitals have released is counted whatever became of it, and what is not known is said."""

import json

import pytest

from common import messages
from common.errors import ConfigError, RefusalCode
from common.messages import Envelope
from common.parameters import to_record
from server.reporting.privacy_statement import privacy_statement
from server.reporting.report import write_report
from server.reporting.run_record import read_run
from server.totals import HospitalTotals, OpenQuestion
from tests.server.fake_federation import (
    FakeGrid,
    error_reply,
    in_round,
    make_config,
    outcomes,
    refuse,
    result_of,
    run,
    silent,
    some_parameters,
    three_hospitals,
)

SPENT_KEYS = ("rounds", "releases", "steps", "epsilon", "epsilon_complete")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def spent(folder, name):
    entry = next(h for h in result_of(folder)["hospitals"] if h["name"] == name)
    return tuple(entry[key] for key in SPENT_KEYS)


def too_large(reply, request):
    reply.content[messages.ARRAYS] = to_record(some_parameters(5, scale=1e5))
    return reply


def with_metrics(**changes):
    def change(reply, request):
        for name, value in changes.items():
            reply.content[messages.METRICS][name.replace("_", "-")] = value
        return reply

    return change


def training(change):
    """Tamper with every training answer."""
    return lambda reply, request: (
        change(reply, request) if request.metadata.message_type == messages.TRAIN else reply
    )


def claims_of(folder):
    card, report = (folder / "MODEL_CARD.md").read_text(), write_report(folder).read_text()
    return json.loads((folder / "model.json").read_text())["privacy"], card, report


def test_updates_that_are_all_refused_by_a_check_are_paid_for_and_in_the_maximum(folder):
    # b trains one more step's worth each round than the others claim: its epsilon must be the maximum
    def refused_and_dear(reply, request):
        number = Envelope.from_record(request.content).key.round_number
        return too_large(with_metrics(epsilon=2.0 * number)(reply, request), request)

    run(make_config(folder), FakeGrid(three_hospitals(b=training(refused_and_dear))))
    assert {outcomes(folder, number)["b"] for number in (1, 2, 3)} == {("invalid", "update-norm")}
    assert spent(folder, "b") == (0, 3, 6, 6.0, True)
    privacy, card, report = claims_of(folder)
    assert (privacy["epsilon"], privacy["epsilon_complete"]) == (6.0, True)
    assert "epsilon at most 6.00" in card
    assert "epsilon at most 6.00" in report


def test_an_abandoned_round_is_paid_for_and_counted_once_when_it_is_resumed(folder):
    broken = {name: in_round(2, too_large) for name in ("a", "b")}
    run(make_config(folder), FakeGrid(three_hospitals(**broken)))
    assert (result_of(folder)["status"], result_of(folder)["rounds"]) == ("quorum-lost", 1)
    for name in "abc":
        assert spent(folder, name) == (1, 2, 4, 1.0, True)
    run(make_config(folder), FakeGrid(three_hospitals()))
    for name in "abc":
        assert spent(folder, name) == (3, 3, 6, 1.5, True)


def test_what_an_abandoned_round_cost_stays_when_the_hospital_does_not_come_back(folder):
    dear = with_metrics(epsilon=7.0)
    broken = {"a": in_round(2, error_reply), "b": in_round(2, error_reply), "c": in_round(2, dear)}
    run(make_config(folder), FakeGrid(three_hospitals(**broken)))
    assert spent(folder, "c") == (1, 2, 4, 7.0, True)
    hospitals = three_hospitals()
    del hospitals[7]
    run(make_config(folder, runtime={"expected-hospitals": 2}), FakeGrid(hospitals))
    assert result_of(folder)["status"] == "completed"
    assert spent(folder, "c") == (1, 2, 4, 7.0, True)
    assert claims_of(folder)[0]["epsilon"] == 7.0


def test_a_stopped_round_is_paid_for(folder):
    def stop_after(reply, request):
        (folder / "stop").touch()
        return reply

    def silent_too(reply, request):
        return None

    hospitals = three_hospitals(a=in_round(2, stop_after), b=in_round(2, silent_too))
    run(make_config(folder), FakeGrid(hospitals))
    assert result_of(folder)["status"] == "stopped"
    assert spent(folder, "a") == (1, 2, 4, 1.0, True)
    assert spent(folder, "b") == (1, 1, 2, 0.5, False)


def test_a_reply_that_comes_after_its_round_is_paid_for(folder):
    kept = []

    def too_late(reply, request):
        reply.content[messages.METRICS]["epsilon"] = 9.0
        kept.append(reply)

    def old_and_a_refusal(reply, request):
        return [kept[0], refuse(RefusalCode.BUDGET)(reply, request)]

    def tamper(reply, request):
        return in_round(2, old_and_a_refusal)(in_round(1, too_late)(reply, request), request)

    run(make_config(folder, server={"deadline-s": 0.15}), FakeGrid(three_hospitals(a=tamper)))
    assert outcomes(folder, 1)["a"] == ("late", None)
    assert spent(folder, "a") == (0, 1, 2, 9.0, True)


def test_a_late_reply_is_written_down_in_the_next_round_and_not_at_the_end_only(folder):
    kept = []

    def too_late(reply, request):
        reply.content[messages.METRICS]["epsilon"] = 9.0
        kept.append(reply)

    def old_only(reply, request):
        return [kept[0]]

    def power_cut(reply, request):
        raise RuntimeError("power cut")

    def tamper(reply, request):
        for number, change in ((1, too_late), (2, old_only), (3, power_cut)):
            reply = in_round(number, change)(reply, request) if reply is not None else None
        return reply

    config = make_config(folder, server={"deadline-s": 0.15})
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, FakeGrid(three_hospitals(a=tamper)))
    assert spent(folder, "a") == (0, 1, 2, 9.0, False)


def test_a_hospital_that_fell_silent_leaves_no_maximum_to_claim(folder):
    config = make_config(folder, server={"deadline-s": 0.15})
    run(config, FakeGrid(three_hospitals(b=in_round(3, silent))))
    assert spent(folder, "b") == (2, 2, 4, 1.0, False)
    assert spent(folder, "a")[-1] is True
    privacy, card, report = claims_of(folder)
    assert (privacy["epsilon"], privacy["epsilon_complete"]) == (None, False)
    for page in (card, report):
        assert "epsilon at most" not in page
        assert "At least one update of b may have been formed" in page
        assert "its ledger has the full count" in page
        assert "1.000 or more" in page


def test_a_later_answer_covers_an_earlier_silence_since_epsilon_is_cumulative(folder):
    config = make_config(folder, server={"deadline-s": 0.15})
    run(config, FakeGrid(three_hospitals(b=in_round(2, silent), c=in_round(1, error_reply))))
    assert spent(folder, "b") == (2, 2, 4, 1.5, True)
    assert spent(folder, "c") == (2, 2, 4, 1.5, True)
    assert privacy_statement(read_run(folder)).headline.endswith("epsilon at most 1.50")


@pytest.mark.parametrize(
    ("code", "complete"),
    [
        (RefusalCode.BUDGET, True),
        (RefusalCode.POLICY, True),
        (RefusalCode.SELF_TEST, True),
        (RefusalCode.METRICS, True),
        (RefusalCode.CONFLICT, False),
        (RefusalCode.APPROVAL, False),
    ],
)
def test_a_refusal_before_the_charge_leaves_nothing_open(folder, code, complete):
    run(make_config(folder), FakeGrid(three_hospitals(b=in_round(3, refuse(code)))))
    assert spent(folder, "b") == (2, 2, 4, 1.0, complete)


UNBELIEVABLE = {
    "too small an epsilon": with_metrics(epsilon=0.1),
    "no noise": with_metrics(noise_multiplier=0.0),
    "absurd noise": with_metrics(noise_multiplier=1e6),
    "more steps than planned": with_metrics(steps=3),
    "no finite epsilon": with_metrics(epsilon=float("inf")),
}


@pytest.mark.parametrize("kind", UNBELIEVABLE)
def test_an_update_whose_cost_is_not_believable_is_counted_and_claims_nothing(folder, kind):
    run(make_config(folder), FakeGrid(three_hospitals(b=training(UNBELIEVABLE[kind]))))
    assert spent(folder, "b") == (0, 3, 6, None, False)
    statement = privacy_statement(read_run(folder))
    assert statement.headline == "Private run, no epsilon to state yet"
    assert "update of b " in statement.explanation


def test_a_server_that_dies_with_questions_out_says_that_it_may_not_know_all(folder):
    def power_cut(reply, request):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(make_config(folder), FakeGrid(three_hospitals(b=in_round(2, power_cut))))
    assert result_of(folder)["status"] == "failed"
    assert [spent(folder, name)[-1] for name in "abc"] == [False] * 3
    run(make_config(folder), FakeGrid(three_hospitals()))
    assert [spent(folder, name) for name in "abc"] == [(3, 3, 6, 1.5, True)] * 3


def test_without_its_file_a_resumed_run_claims_nothing_until_hospitals_answer(folder):
    broken = dict.fromkeys("ab", in_round(2, refuse(RefusalCode.POLICY)))
    run(make_config(folder), FakeGrid(three_hospitals(**broken)))
    (folder / "spent.json").write_text("{")
    run(make_config(folder), FakeGrid(three_hospitals(**broken)))
    assert [spent(folder, name)[-1] for name in "abc"] == [False, False, True]


def test_without_privacy_there_is_nothing_to_complete(folder):
    run(make_config(folder, federation={"private": False}), FakeGrid(three_hospitals(b=training(too_large))))
    assert spent(folder, "b") == (3, 3, 6, None, None)


def test_a_silent_question_is_closed_by_its_own_key_or_a_later_question_only():
    first = OpenQuestion(key="1/1/ab", asked=10.0, until=20.0)
    meanwhile = OpenQuestion(key="2/1/ab", asked=15.0, until=25.0)
    later = OpenQuestion(key="1/2/cd", asked=21.0, until=31.0)
    silent_once = HospitalTotals(enrolled_patients=100).asked(first)
    cost = {"steps": 1.0, "epsilon": 2.0, "delta": 1e-3, "noise-multiplier": 1.0}
    assert not silent_once.asked(meanwhile).released(meanwhile, cost, planned_steps=1).epsilon_complete
    assert silent_once.asked(later).released(later, cost, planned_steps=1).epsilon_complete
    again = OpenQuestion(key="1/1/ab", asked=12.0, until=22.0)
    twice = (
        silent_once.asked(again).released(again, cost, planned_steps=1).released(again, cost, planned_steps=1)
    )
    assert (twice.epsilon_complete, twice.releases, twice.steps) == (True, 1, 1)


def test_repeated_failures_within_a_round_do_not_pile_up():
    totals = HospitalTotals(enrolled_patients=100)
    for second in range(50):
        question = OpenQuestion(key="1/1/ab", asked=float(second), until=second + 100.0)
        totals = totals.asked(question).answered_without_cost(question, received=second + 0.5)
    assert len(totals.open) == 1


FROZEN = {"optimizer": "adam", "learning-rate": 0.5, "momentum": 0.5, "ema-decay": 0.8, "final-model": "last"}


@pytest.mark.parametrize("name", FROZEN)
def test_how_the_server_forms_the_model_cannot_be_changed_by_resuming(folder, name):
    server = {"optimizer": "momentum", "ema-decay": 0.9, "final-model": "ema"}
    run(make_config(folder, server=server), FakeGrid(three_hospitals()))
    with pytest.raises(ConfigError, match=f"server.{name}"):
        run(make_config(folder, server=server | {name: FROZEN[name]}), FakeGrid(three_hospitals()))


def test_how_long_the_server_waits_may_be_changed_by_resuming(folder):
    run(make_config(folder, federation={"rounds": 2}), FakeGrid(three_hospitals()))
    (folder / "checkpoints" / "2" / "manifest.json").unlink()
    free = {"quorum": 1, "patience-s": 0.3, "deadline-s": 4.0, "keep-checkpoints": 4}
    run(make_config(folder, federation={"rounds": 2}, server=free), FakeGrid(three_hospitals()))
    assert result_of(folder)["status"] == "completed"
