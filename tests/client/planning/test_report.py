"""The whole plan: words that hold the numbers, tables, JSON, minutes, a picture."""

import io
import json
from dataclasses import replace

import pytest
from PIL import Image

import client.planning.report
from client.planning.hospital import StepTime
from client.planning.plot import plan_picture, spent_by_round
from client.planning.report import make_report, with_choices
from client.planning.words import sentences, tables
from common.errors import FederationError
from tests.client.planning.planned_hospital import enrol, found
from tests.client.small_hospital import ENROLLED, make_hospital, make_plan

pytestmark = pytest.mark.usefixtures("flower_identity")


@pytest.fixture(autouse=True, scope="module")
def timed():
    """Two seconds a step."""
    with pytest.MonkeyPatch.context() as patch:
        step = StepTime(seconds=2.0, device="cpu, 1 thread(s)")
        patch.setattr(client.planning.report, "measured_step", lambda *_: step)
        yield


def report_of(toml):
    return make_report(found(toml))


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    """A budget for some of 40 rounds."""
    toml = make_hospital(tmp_path_factory.mktemp("fixed") / "north", noise_multiplier=3.0, epsilon=4.0)
    enrol(toml, make_plan(federation={"rounds": 40}))
    return toml


@pytest.fixture(scope="module")
def whole(toml):
    """With its choices: seconds of arithmetic, so once."""
    return with_choices(report_of(toml))


def test_the_words_hold_the_numbers_of_the_plan(whole):
    report = whole
    text, outlook = "\n".join(sentences(report)), report.outlook
    assert 1 < outlook.rounds < 40
    for words in (
        f"your {ENROLLED} patients, sampling rate 0.5, 40 rounds of 2 step(s)",
        "Noise multiplier 3 (given)",
        f"{outlook.rounds} rounds cost epsilon {outlook.epsilon:.4g} at delta {outlook.delta:.3g}",
        f"leaves after round {outlook.rounds}",
        f"spent before 0, afterwards {outlook.epsilon_after:.4g}",
        f"{report.afforded.rounds} rounds fit",
        f"about {2 * 2 * outlook.rounds / 60:.2g} minutes",
    ):
        assert words in text
    assert report.minutes(outlook) == pytest.approx(2 * 2 * outlook.rounds / 60)


def test_the_tables_hold_the_plan_once_and_scale_the_minutes(whole):
    report = whole
    studies, _, noise = tables(report)
    assert [row[0] for row in studies[2]].count(">") == 1
    assert [row[0] for row in noise[2]].count(">") == 1
    by_rate = {
        one.study.privacy.sampling_rate: report.minutes(one) / one.rounds
        for one in report.studies
        if one.study.federation.rounds == 40
    }
    assert by_rate[0.25] * 4 == by_rate[0.5] * 2 == by_rate[1.0]
    rounds = [found.rounds for found in report.noises]
    assert rounds == sorted(rounds)
    assert all(len(row) == len(columns) for _, columns, rows in tables(report) for row in rows)


def test_json_is_the_same_numbers_without_a_nan(whole):
    report = whole
    content = json.loads(json.dumps(report.as_json(), allow_nan=False))
    plan = content["plan"]
    assert content["takes_part"]
    assert plan["epsilon"] == report.outlook.epsilon
    assert plan["plan_digest"] == report.outlook.plan.digest()
    assert plan["budget_left"] == pytest.approx(4.0 - plan["epsilon_after"])
    assert content["affordable"]["rounds"] == plan["rounds_trained"] == report.outlook.rounds
    assert [one["noise_multiplier"] for one in content["other_noise"]] == sorted(
        one.plan.noise_multiplier for one in report.noises
    )
    assert plan in content["other_studies"]
    assert len(content["other_studies"]) == 9
    assert [one["budget"] for one in content["other_budgets"]] == [1.0, 3.0, 4.0, 8.0]


def test_a_refused_plan_says_why_and_what_to_do(tmp_path):
    toml = make_hospital(tmp_path / "north", maximum_local_steps=1)
    enrol(toml)
    report = with_choices(report_of(toml))
    text = "\n".join(sentences(report))
    assert "REFUSED" in text
    assert "policy.maximum-local-steps" in text
    assert "What to do" in text
    assert not report.as_json()["takes_part"]
    assert plan_picture(report) is None
    first, *_ = tables(report)
    assert all("refused" in row[-1] for row in first[2])
    assert not report.noises
    json.dumps(report.as_json(), allow_nan=False)


def test_a_run_without_privacy_is_said_loudly_and_has_no_tables(tmp_path):
    toml = make_hospital(tmp_path / "north", allow_non_private=True)
    enrol(toml, make_plan(federation={"private": False}))
    report = with_choices(report_of(toml))
    assert "NO PRIVACY" in "\n".join(sentences(report))
    assert list(tables(report)) == []
    content = report.as_json()
    assert (content["private"], content["plan"]["epsilon"]) == (False, None)
    assert plan_picture(report) is None


def test_a_step_that_cannot_be_measured_leaves_the_rest(toml, whole, monkeypatch):
    def too_large(*_):
        raise FederationError("a private step does not fit", why="memory", fix="a smaller batch")

    monkeypatch.setattr(client.planning.report, "measured_step", too_large)
    report = report_of(toml)
    assert "not measured, a private step does not fit: memory" in "\n".join(sentences(report))
    assert report.as_json()["plan"]["minutes"] is None
    rows = next(tables(replace(report, studies=whole.studies)))[2]
    assert [row[-2] for row in rows] == [""] * 9


def test_the_picture_ends_where_the_plan_does(whole):
    report = whole
    curve = spent_by_round(report)
    assert curve[0] == (0, 0.0)
    assert curve[-1] == (report.outlook.rounds, report.outlook.epsilon_after)
    assert [cost for _, cost in curve] == sorted(cost for _, cost in curve)
    picture = Image.open(io.BytesIO(plan_picture(report)))
    assert picture.format == "PNG"
    assert picture.width > 2 * picture.height
