"""One round at the hospital: one key, one charge, one answer, whatever the server or fate does."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from PIL import Image
from safetensors.numpy import save

import client.requests
import client.round
from client.fault_points import POINTS
from client.ledger.ledger import Ledger
from client.outbox import SealedAnswer
from common import messages
from common.errors import RefusalCode
from common.messages import refusal_code
from common.parameters import from_record, parameters_sha256, template_of, to_record
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from simulations.engines.processes import start_process, stop_process
from tests.client.small_hospital import (
    CLASSES,
    ENROLLED,
    PATIENTS,
    SIZE,
    ask,
    ask_and_die,
    charges,
    envelope_of,
    everything_in,
    make_hospital,
    make_plan,
    training_request,
    weights_of,
)

CANARY = "CANARY-DOE^JOHN"


@pytest.fixture
def hospital(tmp_path, flower_identity):
    return make_hospital(tmp_path / "north")


@pytest.fixture
def trainings(monkeypatch):
    """How often training began, of either kind."""
    begun = []
    for name in ("train_privately", "train"):
        real = getattr(client.round, name)
        monkeypatch.setattr(
            client.round, name, lambda real=real, name=name, **kw: begun.append(name) or real(**kw)
        )
    return begun


def set_clock(monkeypatch, clock):
    for module in (client.round, client.requests):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=clock))


def delta_in(answer):
    return from_record(answer[messages.ARRAYS], template_of(weights_of(make_plan())))


def digest_of(answer):
    return SealedAnswer(delta=delta_in(answer), metrics=dict(answer["metrics"])).digest


def log_of(toml):
    return toml.parent / "state" / "hospital.log"


# --- what an answer is ---


def test_an_answer_is_the_delta_the_envelope_and_the_plans_own_numbers(hospital):
    answer = ask(hospital, training_request())
    assert set(answer) == {"envelope", "arrays", "metrics", messages.LEDGER_RECEIPT}
    (charge,) = charges(hospital)
    metrics = dict(answer["metrics"])
    assert set(metrics) == messages.METRIC_WHITE_LIST
    assert metrics["num-examples"] == ENROLLED != PATIENTS
    assert metrics["training-started"] <= metrics["training-ended"] <= time.time()
    event = PrivacyEvent(sampling_rate=0.5, noise_multiplier=metrics["noise-multiplier"], steps=2)
    assert charge.event == event
    assert metrics["delta"] == charge.delta == 1 / (10 * ENROLLED)
    claimed = epsilon([event], delta=metrics["delta"])
    assert claimed <= metrics["epsilon"] <= 1.005 * claimed
    assert charge.sealed_sha256 == digest_of(answer)
    assert messages.Envelope.from_record(answer) == envelope_of(weights_of(make_plan()))


def test_a_hospital_solves_for_the_noise_that_all_rounds_can_afford(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north", mode="solve", epsilon=4.0)
    metrics = ask(toml, training_request())["metrics"]
    whole = PrivacyEvent(sampling_rate=0.5, noise_multiplier=metrics["noise-multiplier"], steps=4 * 2)
    assert 3.95 < epsilon([whole], delta=metrics["delta"]) <= 4.0
    assert metrics["epsilon"] < 4.0


def test_two_runs_on_the_same_weights_get_different_noise(hospital):
    first, second = (delta_in(ask(hospital, training_request(run_id=run))) for run in ("one", "two"))
    assert not np.allclose(first["output.weight"], second["output.weight"])


def test_a_server_that_asks_for_images_gets_patients_where_they_are_known(hospital):
    ask(hospital, training_request(make_plan(data={"unit": "image"})))
    assert [charge.unit for charge in charges(hospital)] == ["patient"]


# --- one key, one charge, one answer ---


def test_the_same_question_gets_the_same_bytes_and_is_charged_once(hospital, trainings):
    answers = [everything_in(ask(hospital, training_request())) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert len(charges(hospital)) == len(trainings) == 1


def test_the_same_question_four_times_at_once_is_trained_once(hospital, trainings, monkeypatch):
    begin = client.round._trained
    monkeypatch.setattr(client.round, "_trained", lambda *a, **kw: (time.sleep(0.2), begin(*a, **kw))[1])
    requests = [training_request() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        answers = [everything_in(a) for a in threads.map(lambda r: ask(hospital, r), requests)]
    assert all(answer == answers[0] for answer in answers)
    assert len(charges(hospital)) == len(trainings) == 1


@pytest.mark.parametrize("point", POINTS)
def test_a_round_killed_anywhere_is_answered_once_on_one_charge(hospital, point):
    process, connection = start_process(ask_and_die, (str(hospital), point), name="hospital")
    try:
        assert connection.recv_bytes() == b"asked"
        with pytest.raises(EOFError):
            connection.recv_bytes()
        process.join(20)
        assert process.exitcode == -9
    finally:
        stop_process(process, connection)
    at = POINTS.index(point)
    before = charges(hospital)
    assert len(before) == (at > 0)
    assert [charge.sealed_sha256 is not None for charge in before] == [at >= POINTS.index("marked")][:at]
    sealed = [path.read_bytes() for path in hospital.parent.glob("state/outbox/*.safetensors")]
    assert len(sealed) == (at >= POINTS.index("sealed-before-mark"))

    answer = ask(hospital, training_request())
    (charge,) = charges(hospital)
    assert charge.sealed_sha256 == digest_of(answer)
    assert charge.event.noise_multiplier == answer["metrics"]["noise-multiplier"]
    assert not before or before[0].hash == charge.hash
    if sealed:  # what was sealed is what is sent
        (file,) = hospital.parent.glob("state/outbox/*.safetensors")
        assert file.read_bytes() == sealed[0]
    assert everything_in(ask(hospital, training_request())) == everything_in(answer)
    assert Ledger.open(hospital.parent / "ledger").verify() == []


def test_an_answer_that_was_lost_after_sealing_is_not_trained_again(hospital, trainings):
    ask(hospital, training_request())
    for file in hospital.parent.glob("state/outbox/*.safetensors"):
        file.unlink()
    before = charges(hospital)
    for _ in range(2):
        assert refusal_code(ask(hospital, training_request())) is RefusalCode.CONFLICT
    assert charges(hospital) == before
    assert len(trainings) == 1


def test_the_same_round_for_other_weights_is_refused(hospital, trainings):
    plan = make_plan()
    ask(hospital, training_request(plan))
    other = training_request(plan, weights_of(plan, seed=1))
    assert refusal_code(ask(hospital, other)) is RefusalCode.CONFLICT
    assert len(charges(hospital)) == len(trainings) == 1


def test_a_new_attempt_is_charged_anew(hospital):
    plan = make_plan()
    ask(hospital, training_request(plan))
    answer = ask(hospital, training_request(plan, weights_of(plan, seed=1), attempt=2))
    assert refusal_code(answer) is None
    assert [charge.key.attempt for charge in charges(hospital)] == [1, 2]


DAMAGES = {
    "a flipped bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "cut short": lambda content: content[:-5],
    "a torn header": lambda content: content[:20],
    "emptied": lambda content: b"",
    "something else": lambda content: b"no answer at all",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_sealed_answer_is_neither_sent_nor_trained_again(hospital, trainings, damage):
    ask(hospital, training_request())
    (file,) = hospital.parent.glob("state/outbox/*.safetensors")
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert refusal_code(ask(hospital, training_request())) is RefusalCode.LEDGER
    assert len(charges(hospital)) == len(trainings) == 1


# --- what is refused before anything is charged ---


def with_arrays(change):
    """The global weights with something changed that their envelope does not say."""

    def make():
        request = training_request()
        weights = dict(weights_of(make_plan()))
        change(weights)
        request.content["arrays"] = to_record(weights)
        return request

    return make


def put(**arrays):
    return with_arrays(lambda found: found.update({k.replace("_", "."): v for k, v in arrays.items()}))


def with_file(content, stype="safetensors"):
    return with_record("arrays", ArrayRecord({"parameters": Array("uint8", (1,), stype, content)}))


def with_value(value):
    """Weights that are what the envelope says, with one impossible value."""

    def make():
        weights = weights_of(make_plan())
        weights["output.bias"][0] = value
        return training_request(weights=weights)

    return make


def with_record(name, record):
    def make():
        request = training_request()
        if record is None:
            del request.content[name]
        else:
            request.content[name] = record
        return request

    return make


def with_envelope(**fields):
    def make():
        request = training_request()
        for name, value in fields.items():
            request.content["envelope"][name.replace("_", "-")] = value
        return request

    return make


def plan_record(**fields):
    values = {
        "federation.rounds": 4,
        **{k.replace("__", ".").replace("_", "-"): v for k, v in fields.items()},
    }
    return ConfigRecord(values)


BAD_REQUESTS = {
    "other hash": with_envelope(model_hash="0" * 64),
    "other values": put(output_bias=np.ones(2, np.float32)),
    "other shape": put(output_bias=np.zeros(3, np.float32)),
    "other type": with_file(save({"output.bias": np.zeros(2, np.float64)})),
    "pickled": with_file(b"\x80\x04.", stype="pickle"),
    "pickled in disguise": with_file(b"\x80\x04."),
    "one more": put(extra=np.zeros(1, np.float32)),
    "one missing": with_arrays(lambda arrays: arrays.pop("output.bias")),
    "nan": with_value(np.nan),
    "infinite": with_value(-np.inf),
    "no weights": with_record("arrays", None),
    "no plan": with_record("request", None),
    "unknown setting": with_record("request", plan_record(privacy__noise="0")),
    "impossible setting": with_record("request", plan_record(privacy__sampling_rate=2.0)),
    "torn list": with_record("request", plan_record(data__classes='["a", ')),
    "other encoding": with_envelope(encoding="int8"),
    "masked": with_envelope(masked=True),
    "other task": with_envelope(task="segmentation"),
    "round of another kind": with_envelope(round="1"),
    "round beyond all": with_envelope(round=10**9),
    "negative attempt": with_envelope(attempt=-1),
    "endless task": with_envelope(task="x" * 65),
    "run id of a path": with_envelope(run_id="../run"),
    "hash of another kind": with_envelope(model_hash="x" * 64),
}


@pytest.mark.parametrize("bad", BAD_REQUESTS)
def test_a_bad_request_is_refused_uncharged(hospital, trainings, bad):
    assert refusal_code(ask(hospital, BAD_REQUESTS[bad]())) is RefusalCode.WEIGHTS
    assert charges(hospital) == ()
    assert not trainings
    assert refusal_code(ask(hospital, training_request())) is None  # and the round is still to be had


@pytest.mark.parametrize("version", [0, 2, 4, "2"])
def test_another_wire_schema_is_refused(hospital, trainings, version):
    answer = ask(hospital, with_envelope(schema_version=version)())
    assert refusal_code(answer) is RefusalCode.SCHEMA
    assert charges(hospital) == ()
    assert not trainings


@pytest.mark.parametrize("asked", [{"private": False}, {"reproducible": True}])
def test_training_without_privacy_needs_the_hospitals_consent(hospital, trainings, asked):
    answer = ask(hospital, training_request(make_plan(federation=asked)))
    assert refusal_code(answer) is RefusalCode.NOT_PRIVATE
    assert charges(hospital) == ()
    assert not trainings


CLAIMLESS = [
    ({"private": False}, "train"),
    ({"private": False, "reproducible": True}, "train"),
    ({"reproducible": True}, "train_privately"),
]


@pytest.mark.parametrize(("asked", "kind"), CLAIMLESS)
def test_with_consent_nothing_is_claimed(tmp_path, flower_identity, trainings, asked, kind):
    toml = make_hospital(tmp_path / "north", allow_non_private=True)
    answer = ask(toml, training_request(make_plan(federation=asked)))
    assert set(answer["metrics"]) == {"num-examples", "training-started", "training-ended"}
    (charge,) = charges(toml)
    assert not charge.claims_privacy
    assert charge.epsilon is None
    assert (charge.event is None) == (kind == "train")
    assert trainings == [kind]


@pytest.mark.parametrize("asked", [asked for asked, _ in CLAIMLESS if "reproducible" in asked])
def test_reproducible_means_the_same_bits_on_another_disk_and_others_in_another_hospital(
    tmp_path, flower_identity, asked
):
    request = training_request(make_plan(federation=asked))
    names = {"one": "north", "two": "north", "three": "south"}
    tomls = [make_hospital(tmp_path / d, name=n, allow_non_private=True) for d, n in names.items()]
    one, two, three = (parameters_sha256(delta_in(ask(toml, request))) for toml in tomls)
    assert one == two != three


@pytest.mark.parametrize(
    ("policy", "asked", "code"),
    [
        ({"minimum_patients": 31}, {}, "policy"),
        ({"maximum_rounds": 3}, {}, "policy"),
        ({"maximum_local_steps": 1}, {}, "policy"),
        ({"maximum_steps": 7}, {}, "policy"),
        ({"maximum_clip_norm": 0.5}, {}, "policy"),
        ({"maximum_noise_multiplier": 3.0}, {"minimum_noise_multiplier": 3.5}, "policy"),
        ({"mode": "solve", "epsilon": 0.5, "maximum_noise_multiplier": 1.0}, {}, "policy"),
        ({"noise_multiplier": 0.5, "epsilon": 1.0}, {}, "budget-spent"),
    ],
)
def test_what_the_policy_forbids_is_not_charged(tmp_path, flower_identity, trainings, policy, asked, code):
    toml = make_hospital(tmp_path / "north", **policy)
    answer = ask(toml, training_request(make_plan(privacy=asked)))
    assert refusal_code(answer).value == code
    assert charges(toml) == ()
    assert not trainings


def test_no_answer_depends_on_the_true_number_of_patients(tmp_path, flower_identity):
    """24 patients are here and 30 enrolled: what is allowed is decided by the public count alone."""
    toml = make_hospital(tmp_path / "north", minimum_patients=ENROLLED)
    assert refusal_code(ask(toml, training_request())) is None


def test_a_run_with_other_classes_or_larger_images_than_agreed_is_refused(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north", classes=CLASSES, maximum_image_size=SIZE)
    for asked in ({"classes": ("negative", "stage-2")}, {"image-size": SIZE + 1}):
        answer = ask(toml, training_request(make_plan(data=asked)))
        assert refusal_code(answer) is RefusalCode.POLICY
    assert charges(toml) == ()
    assert refusal_code(ask(toml, training_request())) is None


def test_what_is_trained_on_a_standing_charge_is_what_was_charged(hospital, monkeypatch):
    def crash(**_):
        raise MemoryError

    monkeypatch.setattr(client.round, "train_privately", crash)
    ask(hospital, training_request())
    monkeypatch.undo()
    (before,) = charges(hospital)
    for other in ({"l2-clip-norm": 50.0}, {"max-images-per-patient": 9}, {"local-steps": 3}):
        answer = ask(hospital, training_request(make_plan(privacy=other)))
        assert refusal_code(answer) is RefusalCode.CONFLICT
    assert charges(hospital) == (before,)
    assert refusal_code(ask(hospital, training_request())) is None


def test_a_server_may_ask_for_more_noise(hospital):
    ask(hospital, training_request(make_plan(privacy={"minimum-noise-multiplier": 7.5})))
    assert charges(hospital)[0].event.noise_multiplier == 7.5


def test_a_request_past_its_deadline_is_refused(hospital, trainings):
    request = training_request(ttl=0.01)
    time.sleep(0.02)
    assert refusal_code(ask(hospital, request)) is RefusalCode.LATE
    assert charges(hospital) == ()
    assert not trainings


def test_a_deadline_in_mid_training_ends_it_and_the_charge_is_used_later(hospital, monkeypatch):
    request = training_request()
    now = time.time()
    times = iter([now, now, now, now + 7200])  # limit, arrival, before the charge, before step 1
    set_clock(monkeypatch, lambda: next(times))
    assert refusal_code(ask(hospital, request)) is RefusalCode.LATE
    (before,) = charges(hospital)
    assert before.sealed_sha256 is None
    monkeypatch.undo()
    assert refusal_code(ask(hospital, training_request())) is None
    (after,) = charges(hospital)
    assert (after.hash, after.sealed_sha256 is None) == (before.hash, False)


def test_a_round_that_is_late_once_the_images_are_read_is_not_paid_for(hospital, trainings, monkeypatch):
    request, late = training_request(), []
    real = client.round._checked_images

    def slowly(*arguments):
        late.append(7200)
        return real(*arguments)

    monkeypatch.setattr(client.round, "_checked_images", slowly)
    set_clock(monkeypatch, lambda: time.time() + sum(late))
    assert refusal_code(ask(hospital, request)) is RefusalCode.LATE
    assert charges(hospital) == ()
    assert not trainings
    assert "while the images were read" in log_of(hospital).read_text()
    monkeypatch.undo()
    assert refusal_code(ask(hospital, training_request())) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_too_little_memory_in_a_round_is_told_at_home_with_the_physical_batch(hospital, monkeypatch, error):
    def fail(**_):
        raise error

    monkeypatch.setattr(client.round, "train_privately", fail)
    assert refusal_code(ask(hospital, training_request())) is RefusalCode.INTERNAL
    log = log_of(hospital).read_text()
    assert "Traceback" not in log
    assert "does not fit into the memory of cpu" in log
    assert "ask the operator for a smaller training.physical-batch-size" in log


def test_a_spent_budget_is_told_at_home_with_used_asked_limit_and_when(tmp_path, flower_identity):
    one = PrivacyEvent(sampling_rate=0.5, noise_multiplier=2.0, steps=2)
    budget = 1.0001 * epsilon([one], delta=1 / (10 * ENROLLED))
    toml = make_hospital(tmp_path / "north", epsilon=budget)
    assert refusal_code(ask(toml, training_request())) is None
    assert refusal_code(ask(toml, training_request(round_number=2))) is RefusalCode.BUDGET
    log = log_of(toml).read_text()
    used = epsilon([one], delta=1 / (10 * ENROLLED))
    for words in (
        f"used: epsilon {used:.3g}"[:-1],
        f"limit {budget:g}",
        "asked: 2 step(s) at noise multiplier 2",
    ):
        assert words in log, log
    assert "never for these patients; with new patients' data, or a larger policy.epsilon" in log


def test_a_budget_for_three_rounds_gives_three_answers(tmp_path, flower_identity, trainings):
    sigma, delta = 2.0, 1 / (10 * ENROLLED)
    rounds = [PrivacyEvent(sampling_rate=0.5, noise_multiplier=sigma, steps=2 * n) for n in (3, 4)]
    three, four = (epsilon([event], delta=delta) for event in rounds)
    toml = make_hospital(tmp_path / "north", noise_multiplier=sigma, epsilon=three * 1.0001)
    assert three * 1.0001 < four
    plan = make_plan(federation={"rounds": 10})
    answers = [ask(toml, training_request(plan, round_number=number)) for number in range(1, 6)]
    assert [refusal_code(answer) for answer in answers] == [None, None, None, *[RefusalCode.BUDGET] * 2]
    assert [charge.key.round_number for charge in charges(toml)] == [1, 2, 3]
    assert len(trainings) == 3
    spent = [answer["metrics"]["epsilon"] for answer in answers[:3]]
    assert spent == sorted(spent)
    assert spent[-1] <= three * 1.0001
    # Another study on the same patients finds the same empty purse.
    assert refusal_code(ask(toml, training_request(plan, run_id="other"))) is RefusalCode.BUDGET


def test_the_last_affordable_round_is_answered_also_after_a_crash(tmp_path, flower_identity, monkeypatch):
    one = PrivacyEvent(sampling_rate=0.5, noise_multiplier=2.0, steps=2)
    budget = 1.0001 * epsilon([one], delta=1 / (10 * ENROLLED))
    toml = make_hospital(tmp_path / "north", epsilon=budget)

    def crash(**_):
        raise MemoryError

    monkeypatch.setattr(client.round, "train_privately", crash)
    assert refusal_code(ask(toml, training_request())) is RefusalCode.INTERNAL
    monkeypatch.undo()
    (before,) = charges(toml)
    assert refusal_code(ask(toml, training_request())) is None
    (after,) = charges(toml)
    assert after.hash == before.hash
    assert refusal_code(ask(toml, training_request(round_number=2))) is RefusalCode.BUDGET


def test_images_without_patients_are_refused_to_a_run_that_protects_patients(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north", unit="image")
    assert refusal_code(ask(toml, training_request())) is RefusalCode.DATA
    assert charges(toml) == ()
    plan = make_plan(data={"unit": "image"})
    assert refusal_code(ask(toml, training_request(plan))) is None
    assert [charge.unit for charge in charges(toml)] == ["image"]


# --- no word leaves ---


def leaves_no_word(toml, answer, code):
    assert everything_in(answer)["refusal"] == {"code": code}
    assert set(answer) == {"envelope", "refusal"}
    assert CANARY not in repr(everything_in(answer))
    audit = (toml.parent / "state" / "audit.jsonl").read_text()
    assert CANARY not in audit
    assert [json.loads(line)["what"] for line in audit.splitlines()] == [f"refusal {code}"]
    return CANARY in log_of(toml).read_text() and log_of(toml).stat().st_mode & 0o777 == 0o600


def test_a_patients_name_in_a_data_error_stays_in_the_hospitals_own_log(tmp_path, flower_identity):
    films = tmp_path / "films"
    for label in ("negative", "positive"):
        (films / label).mkdir(parents=True)
        Image.new("L", (12, 12), 90).save(films / label / f"{CANARY}-{label}.png")
        (films / label / f"{CANARY}-broken.png").write_bytes(b"no picture")
    toml = make_hospital(tmp_path / "north", data=str(films))
    answer = ask(toml, training_request(make_plan(data={"unit": "image"})))
    assert leaves_no_word(toml, answer, "data")
    assert charges(toml) == ()


def test_a_patients_name_in_any_exception_stays_in_the_hospitals_own_log(hospital, monkeypatch):
    def fail(**_):
        raise RuntimeError(f"tensor of {CANARY}.png is odd")

    monkeypatch.setattr(client.round, "train_privately", fail)
    assert leaves_no_word(hospital, ask(hospital, training_request()), "internal-error")
    assert charges(hospital)[0].sealed_sha256 is None
    monkeypatch.undo()
    assert refusal_code(ask(hospital, training_request())) is None
    assert len(charges(hospital)) == 1
