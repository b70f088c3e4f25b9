"""What the person at the hospital hears of rounds: answers, refusals in their words, no names of files."""

import pytest

from client.deployment.work import Work
from client.hospital_log import write_entry
from client.provisioning import round_news
from client.provisioning.round_news import RoundNews
from common import messages
from common.errors import BudgetError, DataError, FederationError, Refusal, RefusalCode

BUDGET = BudgetError("the budget is spent", why="used 3 of 3", fix="new patients")


def trained(number, *, epsilon, refusal=""):
    return Work(
        last_type=messages.TRAIN,
        last_round=number,
        last_ended=1000.0 + number,
        last_refusal=refusal,
        epsilon=epsilon,
    )


@pytest.fixture
def news(tmp_path):
    return RoundNews(tmp_path, epsilon_limit=8.0)


def test_an_answered_round_is_one_line_with_its_cost(news):
    assert news.of(Work()) == ""
    assert news.of(trained(3, epsilon=1.23456)) == (
        "round 3 answered, epsilon 1.235 in this run so far (budget over all runs 8)"
    )
    assert news.of(trained(3, epsilon=1.23456)) == ""
    assert news.of(trained(4, epsilon=None)) == "round 4 answered, no privacy is claimed for it"
    assert news.of(Work(last_type=messages.HELLO, last_round=4, last_ended=9e9)) == ""


def test_an_answered_evaluation_is_told_with_its_cost_also_when_a_model_followed(news):
    scored = {"last_ended": 9.0, "last_type": messages.HELLO, "last_evaluated": 8.0}
    assert news.of(Work(**scored, evaluation_epsilon=0.99961)) == (
        "counts about validation patients answered, epsilon 0.9996 for them by this run's evaluations so far"
    )
    assert news.of(Work(**scored, evaluation_epsilon=0.99961)) == ""
    assert "no privacy is claimed" in news.of(Work(**{**scored, "last_evaluated": 9.5}))


def test_a_refusal_is_told_once_in_its_three_lines(news, tmp_path, monkeypatch):
    write_entry(tmp_path / "hospital.log", BUDGET)
    told = news.of(trained(5, epsilon=None, refusal="budget-spent"))
    assert told.splitlines() == ["refused (budget-spent): the budget is spent", "used 3 of 3", "new patients"]
    assert news.of(trained(5, epsilon=None, refusal="budget-spent")) == ""
    write_entry(tmp_path / "hospital.log", BUDGET)  # the next round, the same words
    assert news.of(trained(6, epsilon=None, refusal="budget-spent")) == ""
    write_entry(tmp_path / "hospital.log", Refusal(RefusalCode.PAUSED, "this hospital pauses"))
    assert news.of(Work()) == "refused (paused): this hospital pauses"
    monkeypatch.setattr(round_news, "_SAY_AGAIN_S", 0.0)
    write_entry(tmp_path / "hospital.log", BUDGET)
    assert "refused (budget-spent)" in news.of(Work())


def test_what_was_refused_before_the_start_is_not_told(tmp_path):
    write_entry(tmp_path / "hospital.log", BUDGET)
    assert RoundNews(tmp_path, epsilon_limit=8.0).of(Work()) == ""


@pytest.mark.parametrize(
    "error", [DataError("DOE^JOHN.png is torn"), RuntimeError("DOE^JOHN.png"), KeyError("DOE^J")]
)
def test_words_that_may_name_a_file_stay_in_the_hospitals_own_log(news, tmp_path, error):
    write_entry(tmp_path / "hospital.log", error)
    told = news.of(Work())
    assert "DOE" not in told
    assert str(tmp_path / "hospital.log") in told


def test_too_little_memory_is_told_with_its_remedy(news, tmp_path):
    error = FederationError(
        "too large", why="64 images at once (training.physical-batch-size)", fix="smaller"
    )
    write_entry(tmp_path / "hospital.log", error)
    assert news.of(Work()).splitlines()[-1] == "smaller"
