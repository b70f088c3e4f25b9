"""A person's word: on a run's plan before anything is trained, and on each update before it leaves."""

import json
import os
import threading
import time

import pytest
from typer.testing import CliRunner

import client.approval.approvals
from client.approval.approvals import Approvals, plan_digest
from client.cli import app
from client.site_lock import site_lock
from common.errors import RefusalCode
from common.messages import refusal_code
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from tests.client.planning.planned_hospital import enrol
from tests.client.small_hospital import (
    ENROLLED,
    ask,
    charges,
    everything_in,
    make_hospital,
    make_plan,
    training_request,
)

pytestmark = pytest.mark.usefixtures("flower_identity")
DELTA = 1 / (10 * ENROLLED)


@pytest.fixture
def hospital(tmp_path):
    return make_hospital(tmp_path / "north", approval="plan")


@pytest.fixture
def update_hospital(tmp_path):
    return make_hospital(tmp_path / "north", approval="update")


def approve(toml, *arguments):
    result = CliRunner().invoke(app, ["approve", str(toml.parent), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def listed(toml):
    return json.loads(approve(toml, "--format", "json"))


def of(steps):
    return PrivacyEvent(sampling_rate=0.5, noise_multiplier=2.0, steps=steps)


def test_without_an_approval_nothing_is_read_charged_or_trained(hospital):
    (hospital.parent / "data" / "images.npz").write_bytes(b"not read")
    assert refusal_code(ask(hospital, training_request())) is RefusalCode.APPROVAL
    assert charges(hospital) == ()
    pending = hospital.parent / "state" / "approvals"
    paths = (pending, pending / "run", pending / "run" / "plan.json")
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o700, 0o700, 0o600]


def test_what_waits_is_listed_with_the_planners_numbers(hospital):
    plan = make_plan(federation={"rounds": 4})
    ask(hospital, training_request(plan))
    (waiting,) = listed(hospital)["plans"]
    assert (waiting["run"], waiting["digest"]) == ("run", plan_digest(plan, "run"))
    assert (waiting["model"], waiting["rounds"], waiting["local_steps"]) == ("softmax", 4, 2)
    assert (waiting["sampling_rate"], waiting["l2_clip_norm"]) == (0.5, 1.0)
    assert waiting["classes"] == ["negative", "positive"]
    assert waiting["noise_multiplier"] == 2.0
    assert waiting["epsilon"] == pytest.approx(epsilon([of(8)], delta=DELTA), rel=1e-12)
    enrol(hospital, plan)
    command = ["plan", str(hospital.parent), "--format", "json", "--without-choices", "--without-timing"]
    planned = json.loads(CliRunner().invoke(app, command).stdout)
    assert planned["plan"]["epsilon"] == waiting["epsilon"]
    assert planned["plan"]["plan_digest"] == waiting["plan_digest"]
    words = approve(hospital)
    digest = f"--digest {waiting['digest'][:16]}"
    for part in ("Run run", "4 rounds of 2 step(s)", "softmax", "negative, positive", digest):
        assert part in words


def test_an_approved_plan_is_trained_for_the_rounds_and_the_cost_that_were_shown(hospital):
    ask(hospital, training_request())
    said = json.loads(approve(hospital, "run", "--format", "json"))
    assert (said["run"], said["rounds"]) == ("run", 4)
    assert said["epsilon"] == pytest.approx(epsilon([of(8)], delta=DELTA), rel=1e-12)
    assert listed(hospital) == {"approval": "plan", "plans": [], "updates": []}
    answers = [ask(hospital, training_request(round_number=number)) for number in (1, 2, 3, 4)]
    assert [refusal_code(answer) for answer in answers] == [None] * 4
    # A round trained again in a new attempt would cost more than was shown.
    again = ask(hospital, training_request(round_number=4, attempt=2))
    assert refusal_code(again) is RefusalCode.APPROVAL
    assert len(charges(hospital)) == 4
    (waiting,) = listed(hospital)["plans"]
    assert "does not fit" in waiting["reason"]


def test_another_plan_or_another_run_is_not_what_was_approved(hospital):
    ask(hospital, training_request())
    approve(hospital, "run")
    changed = make_plan(privacy={"local-steps": 3})
    for request in (training_request(changed), training_request(run_id="other")):
        assert refusal_code(ask(hospital, request)) is RefusalCode.APPROVAL
    assert charges(hospital) == ()
    waiting = {plan["run"]: plan for plan in listed(hospital)["plans"]}
    assert waiting["run"]["reason"] == "the plan is another one than was approved"
    assert waiting["run"]["local_steps"] == 3
    assert refusal_code(ask(hospital, training_request())) is None


def test_a_plan_that_changed_since_it_was_looked_at_is_not_approved(hospital):
    ask(hospital, training_request())
    (seen,) = listed(hospital)["plans"]
    changed = make_plan(privacy={"local-steps": 3})
    ask(hospital, training_request(changed))
    command = ["approve", str(hospital.parent), "run", "--digest", seen["digest"][:16]]
    result = CliRunner().invoke(app, command)
    assert result.exit_code != 0
    for plan in (make_plan(), changed):
        assert refusal_code(ask(hospital, training_request(plan))) is RefusalCode.APPROVAL


@pytest.mark.parametrize(
    ("caps", "trained"),
    [
        (("--rounds", "2"), 2),
        (("--epsilon", str(1.0001 * epsilon([of(6)], delta=DELTA))), 3),
        (("--rounds", "1", "--epsilon", "49"), 1),
    ],
)
def test_caps_end_the_run_here_until_a_person_allows_more(hospital, caps, trained):
    ask(hospital, training_request())
    approve(hospital, "run", *caps)
    codes = [refusal_code(ask(hospital, training_request(round_number=number))) for number in (1, 2, 3, 4)]
    assert codes == [None] * trained + [RefusalCode.APPROVAL] * (4 - trained)
    assert len(charges(hospital)) == trained
    approve(hospital, "run")
    assert refusal_code(ask(hospital, training_request(round_number=trained + 1))) is None


def test_with_solved_noise_an_approved_cost_raises_the_noise_and_all_rounds_are_trained(tmp_path):
    toml = make_hospital(tmp_path / "north", approval="plan", mode="solve", epsilon=8.0)
    plan = make_plan(federation={"rounds": 2}, privacy={"local-steps": 1, "sampling-rate": 1.0})
    ask(toml, training_request(plan))
    approve(toml, "run", "--epsilon", "2")
    answers = [ask(toml, training_request(plan, round_number=number)) for number in (1, 2)]
    assert [refusal_code(answer) for answer in answers] == [None] * 2
    noise = answers[0]["metrics"]["noise-multiplier"]
    whole = PrivacyEvent(sampling_rate=1.0, noise_multiplier=noise, steps=2)
    assert 1.95 < epsilon([whole], delta=DELTA) <= 2.0


def test_a_revoked_approval_ends_training_and_what_was_sealed_is_still_sent(hospital):
    ask(hospital, training_request())
    approve(hospital, "run")
    first = ask(hospital, training_request())
    approve(hospital, "run", "--revoke")
    assert refusal_code(ask(hospital, training_request(round_number=2))) is RefusalCode.APPROVAL
    assert everything_in(ask(hospital, training_request())) == everything_in(first)
    history = (hospital.parent / "state" / "approvals" / "approvals.jsonl").read_text().splitlines()
    assert [json.loads(line)["what"] for line in history] == ["plan approved", "plan revoked"]


def test_an_approval_says_who_and_when_and_no_variable_of_the_environment_says_it(hospital, monkeypatch):
    import pwd

    for name in ("LOGNAME", "USER", "USERNAME"):
        monkeypatch.setenv(name, "somebody-else")
    ask(hospital, training_request())
    approve(hospital, "run")
    approval = Approvals(hospital.parent / "state", hospital=hospital.parent).approval("run")
    assert approval.by == pwd.getpwuid(os.getuid()).pw_name
    assert abs(approval.at - time.time()) < 60


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": "run"}', '{"run": "other", "digest": "x"}'])
def test_a_torn_approval_approves_nothing(hospital, content):
    ask(hospital, training_request())
    approve(hospital, "run")
    (hospital.parent / "state" / "approvals" / "run" / "approved.json").write_text(content)
    assert refusal_code(ask(hospital, training_request())) is RefusalCode.APPROVAL
    assert charges(hospital) == ()


def test_runs_that_a_server_invents_do_not_fill_the_disk_nor_push_an_approval_out(hospital, monkeypatch):
    monkeypatch.setattr(client.approval.approvals, "_MOST_RUNS", 3)
    ask(hospital, training_request())
    approve(hospital, "run")
    for number in range(8):
        ask(hospital, training_request(run_id=f"invented-{number}"))
    assert [plan["run"] for plan in listed(hospital)["plans"]] == [f"invented-{n}" for n in (5, 6, 7)]
    assert refusal_code(ask(hospital, training_request())) is None


# --- updates ---


def test_an_update_that_nobody_lets_leave_is_refused_before_its_deadline_and_goes_later(update_hospital):
    ask(update_hospital, training_request())
    approve(update_hospital, "run")
    begun = time.time()
    assert refusal_code(ask(update_hospital, training_request(ttl=6.0))) is RefusalCode.APPROVAL
    assert 4.0 < time.time() - begun < 6.0
    (charge,) = charges(update_hospital)
    (waiting,) = listed(update_hospital)["updates"]
    assert (waiting["run"], waiting["round"], waiting["kind"]) == ("run", 1, "training")
    assert waiting["sha256"] == charge.sealed_sha256
    assert waiting["bytes"] == 4 * (8 * 8 * 2 + 2)
    assert waiting["epsilon"] == charge.epsilon
    audit = (update_hospital.parent / "state" / "audit.jsonl").read_text()
    assert '"update"' not in audit

    approve(update_hospital, "run", "--round", "1")
    assert listed(update_hospital)["updates"] == []
    answers = [ask(update_hospital, training_request()) for _ in range(2)]
    assert everything_in(answers[0]) == everything_in(answers[1])
    assert [charge.hash for charge in charges(update_hospital)] == [charge.hash]
    # The next one waits anew.
    following = ask(update_hospital, training_request(round_number=2, ttl=3.0))
    assert refusal_code(following) is RefusalCode.APPROVAL


def test_an_update_is_sent_as_soon_as_a_person_lets_it_leave_and_the_site_is_free_meanwhile(update_hospital):
    ask(update_hospital, training_request())
    approve(update_hospital, "run")
    found = []

    def person():
        approvals = Approvals(update_hospital.parent / "state", hospital=update_hospital.parent)
        while not approvals.pending_updates():
            time.sleep(0.05)
        with site_lock(update_hospital.parent / "state", timeout_s=0.5):
            found.append("free")
        approvals.release("run", 1)

    thread = threading.Thread(target=person)
    thread.start()
    answer = ask(update_hospital, training_request(ttl=60.0))
    thread.join()
    assert refusal_code(answer) is None
    assert found == ["free"]


def test_a_release_is_for_one_answer_and_not_for_another_of_the_same_round(update_hospital):
    ask(update_hospital, training_request())
    approve(update_hospital, "run")
    ask(update_hospital, training_request(ttl=3.0))
    approve(update_hospital, "run", "--round", "1")
    other = ask(update_hospital, training_request(attempt=2, ttl=3.0))
    assert refusal_code(other) is RefusalCode.APPROVAL
    assert refusal_code(ask(update_hospital, training_request())) is None
