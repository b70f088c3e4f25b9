"""Checks on replies: properties of damaged replies, and the norm bound against simulated honest training."""

import math
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common import messages
from common.config import PublicPlan
from common.errors import RefusalCode
from common.messages import Envelope, RoundKey
from common.parameters import to_record
from common.privacy.accountant import epsilon_prv, epsilon_rdp, running_epsilon
from common.privacy.plan import PrivacyEvent
from common.settings import parse
from server.hospitals import Hospital
from server.update_checks import (
    ABSOLUTE_NORM_LIMIT,
    Defect,
    Outcome,
    Question,
    Rejection,
    Update,
    judge_reply,
    update_norm_bound,
)
from tests.server.fake_federation import TEMPLATE, FakeGrid, some_parameters

HOSPITAL = Hospital(name="a", node_id=5, enrolled_patients=200)
KEY = RoundKey(run_id="run", attempt=1, round_number=4, model_hash="ab" * 32)
METRICS = {"num-examples": 200, "noise-multiplier": 1.0, "steps": 1, "epsilon": 3.0, "delta": 5e-4}


def question(**plan) -> Question:
    return Question(
        envelope=Envelope(key=KEY),
        plan=parse(PublicPlan, plan, source="test"),
        template=TEMPLATE,
        weights_norm=1.0,
        norm_factor=10.0,
        maximum_noise_multiplier=1000.0,
    )


def reply(content: dict, *, envelope: Envelope | None = None) -> Message:
    FakeGrid({})
    request = Message(RecordDict({}), HOSPITAL.node_id, "train")
    return messages.answer(request, envelope or Envelope(key=KEY), **content)


def good_content() -> dict:
    return {"arrays": to_record(some_parameters(3)), "metrics": MetricRecord(dict(METRICS))}


def test_a_good_reply_gives_its_delta_and_metrics():
    judged = judge_reply(reply(good_content()), question(), HOSPITAL)
    assert isinstance(judged, Update)
    assert judged.metrics == {name: float(value) for name, value in METRICS.items()}
    assert {k: v.tobytes() for k, v in judged.delta.items()} == {
        k: v.tobytes() for k, v in some_parameters(3).items()
    }


@pytest.mark.parametrize("code", RefusalCode)
def test_every_refusal_is_kept_by_its_code(code):
    refused = reply({"refusal": ConfigRecord({"code": code.value})})
    assert judge_reply(refused, question(), HOSPITAL) == Rejection(outcome=Outcome.REFUSED, code=code.value)


@pytest.mark.parametrize("code", ["DOE^JOHN", 3, ["budget-spent"], b"x"])
def test_an_unknown_refusal_is_internal_and_its_text_is_dropped(code):
    refused = reply({"refusal": ConfigRecord({"code": code})})
    assert judge_reply(refused, question(), HOSPITAL) == Rejection(
        outcome=Outcome.REFUSED, code=RefusalCode.INTERNAL.value
    )


def test_a_refusal_for_another_round_is_no_refusal():
    old = Envelope(key=RoundKey(run_id="run", attempt=1, round_number=3, model_hash="ab" * 32))
    refused = reply({"refusal": ConfigRecord({"code": "budget-spent"})}, envelope=old)
    assert judge_reply(refused, question(), HOSPITAL) == Rejection(
        outcome=Outcome.INVALID, code=Defect.ROUND_KEY.value
    )


def test_a_reproducible_run_names_no_noise_and_has_the_absolute_limit_only():
    plan = {"federation": {"reproducible": True}}
    metrics = MetricRecord({"num-examples": 200})
    content = {"arrays": to_record(some_parameters(3, scale=1e4)), "metrics": metrics}
    assert isinstance(judge_reply(reply(content), question(**plan), HOSPITAL), Update)
    assert judge_reply(reply(content), question(), HOSPITAL).code == Defect.NOISE


def test_less_noise_than_the_server_asked_for_is_invalid():
    demanding = question(privacy={"minimum-noise-multiplier": 1.5})
    assert judge_reply(reply(good_content()), demanding, HOSPITAL) == Rejection(
        outcome=Outcome.INVALID, code=Defect.NOISE.value
    )


@pytest.mark.parametrize("value", [-1, 0, 199, 201, 10**12, 200.5])
def test_only_the_enrolled_count_is_a_weight(value):
    content = good_content() | {"metrics": MetricRecord(METRICS | {"num-examples": value})}
    assert judge_reply(reply(content), question(), HOSPITAL) == Rejection(
        outcome=Outcome.INVALID, code=Defect.NUM_EXAMPLES.value
    )


def test_a_hospital_whose_count_was_changed_in_the_run_states_the_new_one():
    renewed = replace(HOSPITAL, own_count=240)
    content = good_content() | {"metrics": MetricRecord(METRICS | {"num-examples": 240})}
    assert isinstance(judge_reply(reply(content), question(), renewed), Update)
    assert isinstance(judge_reply(reply(good_content()), question(), renewed), Rejection)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
anything = st.floats(width=32)


@settings(max_examples=150, deadline=None)
@given(st.lists(anything, min_size=3, max_size=3), st.sampled_from([0.0, -0.0, 1e-40, 1.0]))
def test_a_reply_is_an_update_exactly_when_finite_and_within_the_norm(values, filling):
    arrays = {"bias": np.array(values, np.float32), "weight": np.full((4, 3), filling, np.float32)}
    judged = judge_reply(reply(good_content() | {"arrays": to_record(arrays)}), question(), HOSPITAL)
    norm = math.sqrt(sum(float(v) ** 2 for a in arrays.values() for v in a.ravel()))
    bound = update_norm_bound(
        PublicPlan(), num_parameters=15, enrolled=200, noise_multiplier=1.0, weights_norm=1.0
    )
    if not all(math.isfinite(value) for value in values):
        assert judged == Rejection(outcome=Outcome.INVALID, code=Defect.ARRAYS.value)
    elif norm > 10 * bound * (1 + 1e-6):
        assert judged == Rejection(outcome=Outcome.INVALID, code=Defect.NORM.value)
    elif norm < 10 * bound * (1 - 1e-6):
        assert isinstance(judged, Update)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["parameters", "weight", "x"]), st.binary(max_size=300), max_size=3),
    st.sampled_from(["safetensors", "numpy.ndarray", "pickle", ""]),
)
def test_arbitrary_bytes_are_rejected_and_never_raise(data, stype):
    record = ArrayRecord(
        {
            name: Array(dtype="float32", shape=(3,), stype=stype, data=content)
            for name, content in data.items()
        }
    )
    judged = judge_reply(reply(good_content() | {"arrays": record}), question(), HOSPITAL)
    assert judged == Rejection(outcome=Outcome.INVALID, code=Defect.ARRAYS.value)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*sorted(messages.METRIC_WHITE_LIST), "loss", "auc"]),
        st.one_of(st.floats(), st.integers(-(2**40), 2**40), st.lists(st.floats(), max_size=2)),
        max_size=5,
    )
)
def test_arbitrary_metrics_are_rejected_or_within_the_contract(metrics):
    judged = judge_reply(reply(good_content() | {"metrics": MetricRecord(metrics)}), question(), HOSPITAL)
    if isinstance(judged, Rejection):
        assert judged.outcome is Outcome.INVALID
        assert judged.code in set(Defect) - {Defect.UNREADABLE, Defect.ARRAYS}
    else:
        assert set(judged.metrics) <= messages.METRIC_WHITE_LIST
        assert judged.metrics["num-examples"] == 200
        assert judged.metrics["noise-multiplier"] > 0


def test_records_of_the_wrong_kind_are_invalid():
    swapped = {"arrays": MetricRecord({"x": 1}), "metrics": MetricRecord(dict(METRICS))}
    assert judge_reply(reply(swapped), question(), HOSPITAL).code == Defect.ARRAYS
    swapped = good_content() | {"metrics": ConfigRecord({"num-examples": 200})}
    assert judge_reply(reply(swapped), question(), HOSPITAL).code == Defect.METRICS


def test_the_example_of_the_bound():
    plan = parse(PublicPlan, {"privacy": {"sampling-rate": 0.5}}, source="test")
    bound = update_norm_bound(plan, num_parameters=10_000, enrolled=200, noise_multiplier=1.0)
    assert bound == pytest.approx(1.52)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("noise_multiplier", [0.3, 5.0])
def test_honest_private_sgd_stays_below_the_bound_and_the_bound_is_not_idle(momentum, noise_multiplier):
    """The worst honest hospital: every patient's gradient points the same way at full clipping norm."""
    plan = parse(
        PublicPlan,
        {
            "training": {"learning-rate": 0.2, "momentum": momentum, "weight-decay": 0.01},
            "privacy": {"sampling-rate": 0.1, "l2-clip-norm": 2.0, "local-steps": 8},
        },
        source="test",
    )
    enrolled, dimension, random = 300, 500, np.random.default_rng(0)
    start = random.normal(size=dimension)
    direction = -start / np.linalg.norm(start)  # gradient descent along it moves outward
    norms = []
    for _ in range(50):
        weights, velocity = start.copy(), np.zeros(dimension)
        for _ in range(8):
            batch = random.binomial(enrolled, 0.1)
            noise = random.normal(size=dimension) * noise_multiplier * 2.0
            gradient = (batch * 2.0 * direction + noise) / (0.1 * enrolled)
            velocity = momentum * velocity + gradient
            weights = weights * (1 - 0.2 * 0.01) - 0.2 * velocity
        norms.append(np.linalg.norm(weights - start))
    bound = update_norm_bound(
        plan,
        num_parameters=dimension,
        enrolled=enrolled,
        noise_multiplier=noise_multiplier,
        weights_norm=float(np.linalg.norm(start)),
    )
    assert max(norms) < bound < 5 * max(norms)


def test_adam_cannot_exceed_its_bound():
    """The gradient sequence that reaches the Cauchy-Schwarz limit: growing by beta2 / beta1 each step."""
    plan = parse(
        PublicPlan,
        {"training": {"optimizer": "adam", "learning-rate": 0.1}, "privacy": {"local-steps": 60}},
        source="test",
    )
    first = second = 0.0
    moved = []
    for step in range(1, 61):
        gradient = (0.999 / 0.9) ** step
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9**step) / math.sqrt(second / (1 - 0.999**step))
        moved.append(0.1 * corrected)
    bound = update_norm_bound(plan, num_parameters=1, enrolled=10, noise_multiplier=1.0)
    assert sum(moved) < bound
    assert max(moved) < bound / 60


def test_rmsprop_cannot_exceed_its_bound():
    """A first gradient after none: v is a hundredth of its square, so the step is ten learning rates."""
    settings = {"training": {"optimizer": "rmsprop", "learning-rate": 0.1}, "privacy": {"local-steps": 3}}
    plan = parse(PublicPlan, settings, source="test")
    square, moved = 0.0, []
    for gradient in (1.0, 30.0, 1000.0):
        square = 0.99 * square + 0.01 * gradient**2
        moved.append(0.1 * gradient / (math.sqrt(square) + 1e-8))
    bound = update_norm_bound(plan, num_parameters=1, enrolled=10, noise_multiplier=1.0)
    assert 0.9 * bound < sum(moved) < bound


def test_adam_bc_cannot_exceed_its_bound():
    """Gradients growing as in Adam's worst case, with the second moment just above noise and floor."""
    settings = {
        "training": {"optimizer": "adam-bc", "learning-rate": 0.1, "adam-bc-floor": 0.01},
        "privacy": {"local-steps": 60, "sampling-rate": 1.0, "l2-clip-norm": 1.0},
    }
    plan, noise = parse(PublicPlan, settings, source="test"), 2.0 / 10
    bound = update_norm_bound(plan, num_parameters=1, enrolled=10, noise_multiplier=2.0)
    assert bound == pytest.approx(60 * 0.1 * 7.3 * math.sqrt(1 + noise**2 / 0.01))
    for scale in np.geomspace(1e-4, 1.0, 40):
        first = second = 0.0
        moved = []
        for step in range(1, 61):
            gradient = scale * (0.999 / 0.9) ** step
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            corrected = max(second / (1 - 0.999**step) - noise**2, 0.01)
            moved.append(0.1 * first / (1 - 0.9**step) / math.sqrt(corrected))
        assert max(moved) < bound / 60
    assert update_norm_bound(plan, num_parameters=1, enrolled=10, noise_multiplier=None) is None


def test_without_privacy_sgd_has_no_bound_but_the_absolute_one():
    plan = {"federation": {"private": False}}
    assert (
        update_norm_bound(
            parse(PublicPlan, plan, source="test"), num_parameters=15, enrolled=200, noise_multiplier=None
        )
        is None
    )
    metrics = MetricRecord({"num-examples": 200, "steps": 1})
    large = {"bias": np.full(3, 1e4, np.float32), "weight": np.zeros((4, 3), np.float32)}
    content = {"arrays": to_record(large), "metrics": metrics}
    assert isinstance(judge_reply(reply(content), question(**plan), HOSPITAL), Update)
    large["bias"][0] = 2 * ABSOLUTE_NORM_LIMIT
    content = {"arrays": to_record(large), "metrics": metrics}
    assert judge_reply(reply(content), question(**plan), HOSPITAL).code == Defect.NORM


@pytest.mark.parametrize(("noise_multiplier", "code"), [(1000.0, None), (1000.5, Defect.NOISE)])
def test_a_hospital_cannot_widen_its_norm_limit_with_more_noise_than_the_server_takes(noise_multiplier, code):
    content = good_content() | {"metrics": MetricRecord(METRICS | {"noise-multiplier": noise_multiplier})}
    judged = judge_reply(reply(content), question(), HOSPITAL)
    assert (judged.code if isinstance(judged, Rejection) else None) == code


@pytest.mark.parametrize("share", [0.5, 0.98, 1.0, 1.2])
@pytest.mark.parametrize(
    ("sampling_rate", "noise_multiplier", "steps"), [(0.5, 1.0, 1), (0.1, 0.6, 20), (1.0, 3.0, 4)]
)
def test_an_epsilon_below_what_the_round_must_cost_is_refused(sampling_rate, noise_multiplier, steps, share):
    event = PrivacyEvent(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)
    stated = share * epsilon_rdp([event], delta=5e-4)  # another accountant, looser than PLD
    cost = epsilon_prv([event], delta=5e-4)
    metrics = {"num-examples": 200, "noise-multiplier": noise_multiplier, "steps": steps}
    content = good_content() | {"metrics": MetricRecord(metrics | {"epsilon": stated, "delta": 5e-4})}
    plan = {"privacy": {"sampling-rate": sampling_rate, "local-steps": steps}}
    judged = judge_reply(reply(content), question(**plan), HOSPITAL)
    if stated > 1.02 * cost:
        assert isinstance(judged, Update)
    elif stated < 0.95 * cost:
        assert judged == Rejection(outcome=Outcome.INVALID, code=Defect.METRICS.value)
    honest = running_epsilon([event], delta=5e-4)
    for factor, accepted in [(1.0, True), (0.992, True), (0.985, False)]:
        metrics |= {"epsilon": factor * honest, "delta": 5e-4}
        content = good_content() | {"metrics": MetricRecord(metrics)}
        assert isinstance(judge_reply(reply(content), question(**plan), HOSPITAL), Update) is accepted


@pytest.mark.parametrize("missing", ["epsilon", "delta", "steps"])
def test_a_private_answer_states_its_whole_cost(missing):
    metrics = {name: value for name, value in METRICS.items() if name != missing}
    content = good_content() | {"metrics": MetricRecord(metrics)}
    assert judge_reply(reply(content), question(), HOSPITAL).code == Defect.METRICS


def test_hardly_any_noise_is_judged_in_no_time_and_memory():
    content = good_content() | {"metrics": MetricRecord(METRICS | {"noise-multiplier": 1e-12})}
    assert judge_reply(reply(content), question(), HOSPITAL).code == Defect.METRICS
