"""A person's word on scoring the validation patients: shown, approved by number and cost, or left out."""

import json

import pytest
from typer.testing import CliRunner

from client.cli import app
from common.errors import RefusalCode
from common.messages import refusal_code
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from tests.client.small_hospital import ask, charges, make_plan, training_request
from tests.client.test_evaluation import hospital_with, request_of

pytestmark = pytest.mark.usefixtures("flower_identity")
TWICE = {"evaluation": {"checkpoints": 1}}


@pytest.fixture
def hospital(tmp_path):
    return hospital_with(tmp_path / "north", approval="plan")


def approve(toml, *arguments):
    result = CliRunner().invoke(app, ["approve", str(toml.parent), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def waiting(toml):
    return json.loads(approve(toml, "--format", "json"))["plans"]


def evaluated(toml, plan=None, **key):
    return refusal_code(ask(toml, request_of(plan, **key)))


def test_what_waits_says_when_what_and_at_which_cost(hospital):
    plan = make_plan(**TWICE)
    ask(hospital, training_request(plan))
    shown = waiting(hospital)[0]["evaluation"]
    assert (shown["at_end"], shown["after_rounds"], shown["number"]) == (True, [2], 2)
    assert shown["counts"] == ["confusion", "scores"]
    once = PrivacyEvent(sampling_rate=1.0, noise_multiplier=shown["noise_multiplier"], steps=1)
    delta = waiting(hospital)[0]["delta"]
    assert shown["epsilon_each"] == pytest.approx(epsilon([once], delta=delta), rel=1e-12)
    assert shown["epsilon"] == pytest.approx(epsilon([once, once], delta=delta), rel=1e-9)
    assert shown["epsilon_each"] <= 1.0 < shown["epsilon"]
    words = approve(hospital)
    assert "2 evaluation(s) of the validation patients at most (after round 2, at the end)" in words
    assert f"epsilon {shown['epsilon_each']:.4g} each and {shown['epsilon']:.4g} in all" in words


def test_an_approval_allows_as_many_evaluations_as_were_shown_whatever_training_may_cost(hospital):
    plan = make_plan(**TWICE)
    ask(hospital, training_request(plan))
    approve(hospital, "run", "--epsilon", "0.01")
    assert evaluated(hospital, plan, round_number=2) is None
    assert evaluated(hospital, plan, round_number=4) is None
    assert evaluated(hospital, plan, round_number=3) is RefusalCode.APPROVAL
    assert "one more" in waiting(hospital)[0]["reason"]
    assert len(charges(hospital)) == 2


def test_a_person_can_approve_training_alone(hospital):
    ask(hospital, training_request())
    said = approve(hospital, "run", "--no-evaluation")
    assert "No evaluation was approved" in said
    assert refusal_code(ask(hospital, training_request())) is None
    assert evaluated(hospital, round_number=4) is RefusalCode.METRICS
    assert waiting(hospital) == []
    approve(hospital, "run")
    assert evaluated(hospital, round_number=4) is None


def test_a_dearer_evaluation_than_was_approved_waits_and_is_listed(hospital):
    ask(hospital, training_request())
    approve(hospital, "run")
    assert waiting(hospital) == []
    text = hospital.read_text()
    assert "epsilon = 1.0" in text
    hospital.write_text(text.replace("epsilon = 1.0", "epsilon = 2.0"))
    from client.site import _site

    _site.cache_clear()
    assert evaluated(hospital, round_number=4) is RefusalCode.APPROVAL
    assert "above epsilon" in waiting(hospital)[0]["reason"]
    assert charges(hospital) == ()
    approve(hospital, "run")
    assert evaluated(hospital, round_number=4) is None


@pytest.mark.parametrize(
    ("release", "why"),
    [({"metrics": ()}, "release.metrics is empty"), ({"maximum_per_run": 0}, "release.maximum-per-run is 0")],
)
def test_a_hospital_that_releases_nothing_says_so(tmp_path, release, why):
    toml = hospital_with(tmp_path / "north", approval="plan", release=release)
    ask(toml, training_request())
    assert f"No evaluation: {why}." in approve(toml)
    approve(toml, "run")
    assert evaluated(toml, round_number=4) is RefusalCode.METRICS


def test_refusals_name_the_hospitals_folder(hospital):
    ask(hospital, training_request())
    log = (hospital.parent / "state" / "hospital.log").read_text()
    assert f"flower-client approve {hospital.parent} run" in log
    assert "DIR" not in log
