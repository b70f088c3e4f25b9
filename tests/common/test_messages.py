import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from common import messages
from common.config import PublicPlan
from common.errors import RefusalCode, WireError
from common.messages import Envelope, RoundKey, SchemaError
from common.parameters import record_bytes, to_record
from common.settings import parse

KEY = RoundKey(run_id="study-1", attempt=2, round_number=7, model_hash="ab" * 32)


@pytest.fixture
def request_message():
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    return Message(RecordDict({"envelope": Envelope(key=KEY).to_record()}), 5, messages.TRAIN)


def envelope_content(**changes):
    record = Envelope(key=KEY).to_record()
    for name, value in changes.items():
        record[name.replace("_", "-")] = value
    return RecordDict({"envelope": record})


def test_an_envelope_reads_back():
    envelope = Envelope(key=KEY, task="classification", masked=True)
    assert Envelope.from_record(RecordDict({"envelope": envelope.to_record()})) == envelope


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": 3},
        {"attempt": "2"},
        {"attempt": True},
        {"round": 7.0},
        {"model_hash": b"ab"},
        {"masked": 1},
        {"encoding": ["float32"]},
    ],
    ids=str,
)
def test_a_misshapen_envelope_is_refused(changes):
    with pytest.raises(WireError):
        Envelope.from_record(envelope_content(**changes))


@pytest.mark.parametrize("version", [0, 2, 4, "3", None])
def test_another_schema_is_refused_as_such(version):
    content = envelope_content()
    if version is None:
        del content["envelope"]["schema-version"]
    else:
        content["envelope"]["schema-version"] = version
    with pytest.raises(SchemaError):
        Envelope.from_record(content)


def test_a_missing_or_mistaken_envelope_is_refused():
    for content in (RecordDict({}), RecordDict({"envelope": MetricRecord({"round": 7})})):
        with pytest.raises(WireError, match="envelope"):
            Envelope.from_record(content)


def test_the_plan_travels_and_nothing_else_does():
    plan = parse(
        PublicPlan,
        {"data": {"classes": ["no", "yes", "[maybe]"]}, "privacy": {"l2-clip-norm": 0.1}},
        source="test",
    )
    record = messages.plan_to_record(plan)
    assert messages.plan_from_record(RecordDict({"request": record})) == plan
    assert {key.split(".")[0] for key in record} == {
        "federation",
        *("data", "preprocessing", "model", "augmentation", "training"),
        *("privacy", "evaluation", "wire"),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy.sampling-rate": 2.0},
        {"privacy.unknown": 1},
        {"server.quorum": 1},
        {"data.classes": "[not json"},
        {"data.classes": "[" * 100_000},
        {"training": 3},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_an_impossible_plan_is_refused(changes):
    record = messages.plan_to_record(PublicPlan())
    for name, value in changes.items():
        record[name] = value
    with pytest.raises(WireError):
        messages.plan_from_record(RecordDict({"request": record}))


def test_an_answer_repeats_the_envelope_and_goes_back(request_message):
    reply = messages.answer(request_message, Envelope(key=KEY), metrics=MetricRecord({"steps": 1}))
    assert set(reply.content) == {"envelope", "metrics"}
    assert reply.metadata.src_node_id == 5
    assert reply.metadata.reply_to_message_id == request_message.metadata.message_id


@pytest.mark.parametrize("code", RefusalCode)
def test_a_refusal_is_one_code(request_message, code):
    reply = messages.refusal(request_message, Envelope(key=KEY), code)
    assert set(reply.content) == {"envelope", "refusal"}
    assert dict(reply.content["refusal"]) == {"code": code.value}
    assert messages.refusal_code(reply.content) is code


@pytest.mark.parametrize("code", ["DOE^JOHN", 3, 1.5, True, b"policy", ["policy"]])
def test_an_unknown_refusal_becomes_internal(code):
    content = RecordDict({"refusal": ConfigRecord({"code": code})})
    assert messages.refusal_code(content) is RefusalCode.INTERNAL


def test_what_is_no_refusal_is_none():
    assert messages.refusal_code(RecordDict({})) is None
    with pytest.raises(WireError):
        messages.refusal_code(RecordDict({"refusal": MetricRecord({"code": 1})}))


def test_only_white_listed_finite_scalars_are_metrics():
    good = {"num-examples": 200, "noise-multiplier": 1.5, "steps": 3, "epsilon": 0.25, "delta": 1e-4}
    assert messages.metrics_of(RecordDict({"metrics": MetricRecord(dict(good))})) == good
    bad = [{"loss": 0.5}, {"epsilon": float("inf")}, {"epsilon": float("nan")}, {"steps": [1, 2]}]
    for extra in [*bad, {"steps": 10**400}]:
        with pytest.raises(WireError):
            messages.metrics_of(RecordDict({"metrics": MetricRecord(good | extra)}))


def test_the_white_list_is_what_the_design_allows():
    assert {
        "num-examples",
        "training-started",
        "training-ended",
        "noise-multiplier",
        "steps",
        "epsilon",
        "delta",
    } == messages.METRIC_WHITE_LIST


def test_arrays_are_found_or_missed():
    record = to_record({"w": np.zeros(3, np.float32)})
    assert messages.arrays_of(RecordDict({"arrays": record})) == record
    for content in (RecordDict({}), RecordDict({"arrays": ConfigRecord({})})):
        with pytest.raises(WireError, match="arrays"):
            messages.arrays_of(content)


def test_bytes_of_a_content_are_those_of_its_records():
    content = RecordDict({"arrays": to_record({"w": np.zeros(3, np.float32)}), "x": ArrayRecord()})
    assert messages.content_bytes(content) == record_bytes(content["arrays"]) + len("parameters")


def test_a_round_key_prints_short():
    assert str(KEY) == "study-1/2/7/abababababababab"


def test_an_empty_text_has_no_bytes_but_its_name():
    """Flower's own count raises ValueError for one, which a peer could send."""
    content = RecordDict({"receipt": ConfigRecord({"sha256": "abc", "certificate": ""})})
    assert messages.content_bytes(content) == len("sha256") + len("abc") + len("certificate")
