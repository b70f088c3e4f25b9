"""Evaluation at the hospital: what leaves is noised, charged to the validation patients, formed once."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from scipy import stats

from client.fault_points import POINTS, VARIABLE
from client.images.parts import write_part
from client.ledger.ledger import Ledger
from client.outbox import Outbox, SealedAnswer
from common import messages
from common.errors import RefusalCode
from common.evaluation import KINDS, CountPlan
from common.examples import Examples
from common.hospital_config import HospitalConfig
from common.messages import refusal_code
from common.parameters import to_record
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from common.settings import load, to_toml
from simulations.audits.finding import ALPHA
from simulations.engines.processes import start_process, stop_process
from tests.client.small_hospital import (
    CLASSES,
    ENROLLED,
    SIZE,
    ask,
    charges,
    envelope_of,
    everything_in,
    make_hospital,
    make_plan,
    training_request,
    weights_of,
)

VALIDATION = 17
PLAN = CountPlan.of(KINDS, classes=2, score_bins=10)


def patients(numbers, *, seed, label=lambda patient: patient % 2, each=lambda patient: 1 + patient % 3):
    units = np.repeat(np.arange(len(numbers)), [each(number) for number in numbers])
    random = np.random.default_rng(seed)
    return Examples(
        inputs={"image": random.integers(0, 256, (len(units), 1, SIZE, SIZE), dtype=np.uint8)},
        targets=np.array([label(numbers[unit]) for unit in units], dtype=np.int64),
        units=units.astype(np.int64),
        unit_ids=tuple(f"patient-{number}" for number in numbers),
    )


def hospital_with(folder: Path, *, validation=None, release=None, **policy) -> Path:
    """24 patients train, 17 validate."""
    held = patients(range(100, 100 + VALIDATION), seed=5) if validation is None else validation
    part = write_part(
        folder.parent / "images.npz",
        train=patients(range(24), seed=4),
        validation=held,
        classes=CLASSES,
        unit="patient",
    )
    toml = make_hospital(folder, data=str(part), **policy)
    if release is not None:
        config = load(HospitalConfig, toml)
        values = config.model_copy(update={"release": config.release.model_copy(update=release)})
        toml.write_text(to_toml(values))
    return toml


@pytest.fixture
def hospital(tmp_path, flower_identity):
    return hospital_with(tmp_path / "north")


def request_of(plan=None, weights=None, **key) -> Message:
    plan = plan or make_plan()
    weights = weights_of(plan) if weights is None else weights
    content = {
        messages.ENVELOPE: envelope_of(weights, **key).to_record(),
        messages.ARRAYS: to_record(weights),
        messages.REQUEST: messages.plan_to_record(plan),
    }
    return Message(RecordDict(content), 7, messages.EVALUATE, ttl=3600.0)


def counts_in(answer) -> dict[str, list[float]]:
    return dict(answer[messages.COUNTS])


def exact_counts(tmp_path, **made) -> dict[str, list[float]]:
    """What the same hospital says in a run without privacy, which its policy allows."""
    toml = hospital_with(tmp_path / "open", allow_non_private=True, **made)
    return counts_in(ask(toml, request_of(make_plan(federation={"private": False}))))


# --- what an answer is ---


def test_an_answer_is_noised_counts_and_what_they_cost(hospital):
    answer = ask(hospital, request_of())
    assert set(answer) == {"envelope", "counts", "metrics", "ledger-receipt"}
    assert {kind: len(cells) for kind, cells in answer["counts"].items()} == {"confusion": 4, "scores": 20}
    assert all(cell == round(cell) for cells in answer["counts"].values() for cell in cells)
    (charge,) = charges(hospital)
    assert charge.purpose == "evaluation"
    assert (charge.event.sampling_rate, charge.event.steps) == (1.0, 1)
    assert dict(answer["metrics"]) == {
        "num-examples": ENROLLED,
        "noise-multiplier": charge.event.noise_multiplier,
        "epsilon": pytest.approx(1.0, abs=2e-3),
        "delta": 1 / (10 * ENROLLED),
    }


def test_the_noise_is_the_least_that_costs_what_the_hospital_allows(tmp_path, flower_identity):
    for allowed in (0.5, 2.0):
        toml = hospital_with(tmp_path / f"at-{allowed}", release={"epsilon": allowed})
        sigma = ask(toml, request_of())["metrics"]["noise-multiplier"]
        event = PrivacyEvent(sampling_rate=1.0, noise_multiplier=sigma, steps=1)
        less = PrivacyEvent(sampling_rate=1.0, noise_multiplier=sigma - 0.002, steps=1)
        delta = 1 / (10 * ENROLLED)
        assert epsilon([event], delta=delta) <= allowed < epsilon([less], delta=delta)


def test_the_charge_is_to_the_validation_patients_alone(hospital):
    ask(hospital, training_request())
    ask(hospital, request_of())
    training, evaluation = charges(hospital)
    ledger = Ledger.open(hospital.parent / "ledger")
    with ledger._store.reading() as connection:
        sizes = dict(connection.execute("SELECT digest, size FROM cohorts").fetchall())
    assert (sizes[training.cohort_digest], sizes[evaluation.cohort_digest]) == (24, VALIDATION)
    assert ledger.verify() == []


def test_the_noise_on_the_counts_is_the_noise_that_is_stated(tmp_path, flower_identity):
    exact = exact_counts(tmp_path)
    assert sum(exact["confusion"]) == sum(exact["scores"]) == VALIDATION
    toml = hospital_with(tmp_path / "north", release={"maximum_per_run": 100, "epsilon": 3.0}, epsilon=1000.0)
    total, cells = 0.0, 0
    for attempt in range(1, 9):
        answer = ask(toml, request_of(attempt=attempt))
        variance = PLAN.noise_stddev(answer["metrics"]["noise-multiplier"]) ** 2 + 1 / 12
        for kind, counts in counts_in(answer).items():
            total += float(((np.array(counts) - exact[kind]) ** 2).sum()) / variance
            cells += len(counts)
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], cells)
    assert low < total < high


def test_a_patient_with_many_images_counts_once_and_the_majority_is_the_label(tmp_path, flower_identity):
    many = patients(range(5), seed=9, each=lambda patient: 30)
    assert sum(exact_counts(tmp_path, validation=many)["confusion"]) == 5
    turned = Examples(
        inputs=many.inputs,
        targets=np.array([0] * 14 + [1] * 16 + [0] * 15 + [1] * 15 + [0] * 90, dtype=np.int64),
        units=many.units,
        unit_ids=many.unit_ids,
    )
    (tmp_path / "mixed").mkdir()
    confusion = exact_counts(tmp_path / "mixed", validation=turned)["confusion"]
    assert (sum(confusion[:2]), sum(confusion[2:])) == (3, 2)  # a tie goes to the finding


def test_only_the_kinds_that_the_hospital_names_leave_with_the_noise_of_those(tmp_path, flower_identity):
    toml = hospital_with(tmp_path / "north", release={"metrics": ("confusion",)})
    assert set(ask(toml, request_of())["counts"]) == {"confusion"}


def test_without_validation_patients_the_answer_is_noise_alone(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north")
    answer = ask(toml, request_of())
    full = ask(hospital_with(tmp_path / "south"), request_of())
    assert set(answer) == set(full)
    assert dict(answer["metrics"]) == dict(full["metrics"])
    cells = np.concatenate(list(counts_in(answer).values()))
    assert cells.any()
    (charge,) = charges(toml)
    assert charge.event is not None
    assert Ledger.open(toml.parent / "ledger").verify() == []


def test_reproducible_runs_have_seeded_noise_and_claim_nothing(tmp_path, flower_identity):
    plan = make_plan(federation={"reproducible": True})
    tomls = [hospital_with(tmp_path / str(copy) / "north", allow_non_private=True) for copy in range(2)]
    answers = [ask(toml, request_of(plan)) for toml in tomls]
    assert counts_in(answers[0]) == counts_in(answers[1])
    assert set(answers[0]["metrics"]) == {"num-examples", "noise-multiplier"}
    assert not charges(tomls[0])[0].claims_privacy


# --- once, and never twice ---


def test_the_same_question_gets_the_same_bytes_and_is_charged_once(hospital):
    first = everything_in(ask(hospital, request_of()))
    assert everything_in(ask(hospital, request_of())) == first
    (charge,) = charges(hospital)
    assert (
        charge.sealed_sha256
        == SealedAnswer(delta={}, counts=first["counts"], metrics=first["metrics"]).digest
    )


def test_training_and_evaluation_of_one_round_key_do_not_meet(hospital):
    trained, scored = ask(hospital, training_request()), ask(hospital, request_of())
    assert "arrays" in trained
    assert "counts" in scored
    assert [charge.purpose for charge in charges(hospital)] == ["training", "evaluation"]


def ask_and_die(connection, toml: str, point: str) -> None:
    os.environ[VARIABLE] = point
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    ask(Path(toml), request_of())
    connection.send_bytes(b"answered")


@pytest.mark.faults
@pytest.mark.parametrize("point", POINTS)
def test_an_evaluation_killed_anywhere_is_answered_once_on_one_charge(hospital, point):
    process, connection = start_process(ask_and_die, (str(hospital), point), name="hospital")
    try:
        with pytest.raises(EOFError):
            connection.recv_bytes()
        process.join(20)
        assert process.exitcode == -9
    finally:
        stop_process(process, connection)
    before = charges(hospital)
    assert len(before) == (point != POINTS[0])
    sealed = [path.read_bytes() for path in hospital.parent.glob("state/outbox/*.safetensors")]
    answer = everything_in(ask(hospital, request_of()))
    (charge,) = charges(hospital)
    assert not before or before[0].hash == charge.hash
    assert (
        not sealed or [p.read_bytes() for p in hospital.parent.glob("state/outbox/*.safetensors")] == sealed
    )
    assert everything_in(ask(hospital, request_of())) == answer
    assert Ledger.open(hospital.parent / "ledger").verify() == []


def test_a_crash_before_sealing_is_answered_on_the_standing_charge(hospital, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(Outbox, "seal", lambda *_, **__: (_ for _ in ()).throw(OSError("disk")))
        assert refusal_code(ask(hospital, request_of())) is RefusalCode.INTERNAL
    assert "counts" in ask(hospital, request_of())
    assert len(charges(hospital)) == 1


def test_an_answer_that_was_lost_after_sealing_is_not_counted_again(hospital):
    ask(hospital, request_of())
    for path in hospital.parent.glob("state/outbox/*"):
        path.unlink()
    assert refusal_code(ask(hospital, request_of())) is RefusalCode.CONFLICT
    assert len(charges(hospital)) == 1


def test_the_same_round_for_another_model_is_refused(hospital):
    ask(hospital, request_of())
    other = weights_of(make_plan(), seed=1)
    assert refusal_code(ask(hospital, request_of(weights=other))) is RefusalCode.CONFLICT
    assert len(charges(hospital)) == 1


# --- what is refused ---


@pytest.mark.parametrize(
    ("made", "asked", "code"),
    [
        ({"release": {"metrics": ()}}, {}, RefusalCode.METRICS),
        ({"release": {"maximum_per_run": 0}}, {}, RefusalCode.METRICS),
        ({"release": {"epsilon": 1e-3}, "maximum_noise_multiplier": 50.0}, {}, RefusalCode.METRICS),
        ({}, {"plan": make_plan(federation={"private": False})}, RefusalCode.NOT_PRIVATE),
        ({}, {"plan": make_plan(federation={"reproducible": True})}, RefusalCode.NOT_PRIVATE),
        ({"maximum_rounds": 3}, {}, RefusalCode.POLICY),
        ({"minimum_patients": 31}, {}, RefusalCode.POLICY),
        ({"models": ("cnn",)}, {}, RefusalCode.POLICY),
        ({"run_epsilon": 0.9}, {}, RefusalCode.BUDGET),
        ({"approval": "plan"}, {}, RefusalCode.APPROVAL),
        ({}, {"round_number": 5}, RefusalCode.POLICY),
    ],
)
def test_what_is_not_allowed_is_refused_uncharged(tmp_path, flower_identity, made, asked, code):
    toml = hospital_with(tmp_path / "north", **made)
    answer = ask(toml, request_of(**asked))
    assert refusal_code(answer) is code
    assert set(answer) == {"envelope", "refusal"}
    assert charges(toml) == ()


def test_weights_of_another_hash_are_refused_uncharged(hospital):
    request = request_of()
    request.content[messages.ARRAYS] = to_record(weights_of(make_plan(), seed=3))
    assert refusal_code(ask(hospital, request)) is RefusalCode.WEIGHTS
    assert charges(hospital) == ()


def test_a_run_has_no_more_evaluations_than_the_hospital_allows_and_says_what_they_cost(
    tmp_path, flower_identity
):
    toml = hospital_with(tmp_path / "north", release={"maximum_per_run": 2})
    costs = [ask(toml, request_of(round_number=number))["metrics"]["epsilon"] for number in (1, 2)]
    assert refusal_code(ask(toml, request_of(round_number=3))) is RefusalCode.METRICS
    assert "counts" in ask(toml, request_of(round_number=2))  # what was answered is sent again
    sigma = charges(toml)[0].event.noise_multiplier
    both = PrivacyEvent(sampling_rate=1.0, noise_multiplier=sigma, steps=2)
    assert costs[1] == pytest.approx(epsilon([both], delta=1 / (10 * ENROLLED)), rel=5e-3)
    assert len(charges(toml)) == 2
    assert "counts" in ask(toml, request_of(run_id="another"))


def test_evaluations_of_all_runs_fit_the_budget_of_the_validation_patients(tmp_path, flower_identity):
    toml = hospital_with(tmp_path / "north", release={"maximum_per_run": 10}, epsilon=2.0)
    answers = [ask(toml, request_of(run_id=f"run-{number}")) for number in range(5)]
    counted = [answer for answer in answers if "counts" in answer]
    codes = {refusal_code(answer) for answer in answers if "counts" not in answer}
    assert codes == {RefusalCode.BUDGET}
    events = [charge.event for charge in charges(toml)]
    assert len(events) == len(counted)
    delta = 1 / (10 * ENROLLED)
    assert epsilon(events, delta=delta) <= 2.0 < epsilon([*events, events[0]], delta=delta)


@pytest.mark.parametrize("composition", ["site", "patient"])
def test_who_trains_and_who_validates_pay_apart_in_one_run_and_together_over_runs(
    tmp_path, flower_identity, composition
):
    """A budget that one round of training nearly spends: the same run may still be evaluated."""
    sigma, delta = 2.0, 1 / (10 * ENROLLED)
    knobs = make_plan().privacy
    one = PrivacyEvent(sampling_rate=knobs.sampling_rate, noise_multiplier=sigma, steps=knobs.local_steps)
    budget = 1.05 * epsilon([one], delta=delta)
    toml = hospital_with(
        tmp_path / "north", epsilon=budget, composition=composition, release={"epsilon": 0.9 * budget}
    )
    assert "counts" in ask(toml, request_of(round_number=1))
    assert "arrays" in ask(toml, training_request(round_number=2))
    elsewhere = ask(toml, request_of(run_id="another"))
    # By site another run's evaluation counts as if its patients had trained, by patient as what it is.
    assert refusal_code(elsewhere) is RefusalCode.BUDGET
    assert Ledger.open(toml.parent / "ledger").verify() == []
    assert math.isfinite(Ledger.open(toml.parent / "ledger").spent(delta).epsilon)


# --- the door ---


def test_the_audit_says_what_left_and_what_it_cost(hospital):
    import json

    answer = ask(hospital, request_of())
    lines = [
        json.loads(line) for line in (hospital.parent / "state" / "audit.jsonl").read_text().splitlines()
    ]
    (line,) = [line for line in lines if line["what"] == "evaluation"]
    assert (line["run"], line["round"]) == ("run", 1)
    assert sum(line["records"]["counts"]["lengths"].values()) == 24
    assert line["noise_multiplier"] == answer["metrics"]["noise-multiplier"]
    assert line["epsilon"] == answer["metrics"]["epsilon"]
