"""Every message gets an answer without words, whatever goes wrong in the hospital."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import client.answering
import client.app
from client.answering import answered
from common import messages
from common.errors import (
    BatchNormError,
    BudgetError,
    ConfigError,
    DataError,
    FederationError,
    GuardError,
    LedgerError,
    ModelError,
    PolicyError,
    Refusal,
    RefusalCode,
    WireError,
)
from common.messages import SCHEMA_VERSION, refusal_code
from tests.client.small_hospital import (
    ask,
    ask_as,
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


def hello():
    return Message(
        RecordDict({messages.ENVELOPE: envelope_of(weights_of(make_plan())).to_record()}), 7, messages.HELLO
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BudgetError(CANARY), "budget-spent"),
        (PolicyError(CANARY), "policy"),
        (GuardError(CANARY), "policy"),
        (LedgerError(CANARY), "ledger"),
        (DataError(CANARY), "data"),
        (ModelError(CANARY), "model"),
        (BatchNormError(CANARY), "model"),
        (WireError(CANARY), "weights"),
        (ConfigError(CANARY), "internal-error"),
        (FederationError(CANARY), "internal-error"),
        (Refusal(RefusalCode.STALE, CANARY), "stale-round"),
        (OSError(28, CANARY), "internal-error"),
        (MemoryError(CANARY), "internal-error"),
        (RecursionError(CANARY), "internal-error"),
        (UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY), "internal-error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_an_error_leaves_as_one_word_and_is_told_at_home(hospital, monkeypatch, error, code):
    def fail(*_):
        raise error

    monkeypatch.setattr(client.app, "train_round", fail)
    answer = ask(hospital, training_request())
    assert {name: dict(record) for name, record in answer.items() if name != "envelope"} == {
        "refusal": {"code": code}
    }
    assert CANARY not in repr(everything_in(answer))
    log = hospital.parent / "state" / "hospital.log"
    assert CANARY in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_message_without_envelope_is_answered(hospital):
    answer = ask(hospital, Message(RecordDict(), 7, messages.TRAIN))
    assert refusal_code(answer) is RefusalCode.WEIGHTS
    assert answer["envelope"]["run-id"] == ""


@pytest.mark.parametrize(
    "nodes",
    [{"hospital-config": f"/no/{CANARY}/hospital.toml"}, {}, {"partition-id": 5, "num-partitions": 9}],
    ids=["no file", "nobody", "not on the roster"],
)
def test_a_hospital_that_cannot_be_opened_still_answers(tmp_path, flower_identity, nodes):
    (tmp_path / "roster.json").write_text('{"hospitals": ["north"]}')
    answer = ask_as(nodes, training_request(), **{"runtime.hospitals": str(tmp_path)})
    assert refusal_code(answer) is RefusalCode.INTERNAL
    assert CANARY not in repr(everything_in(answer))


@pytest.mark.parametrize("file", ["hospital.log", "audit.jsonl"])
def test_a_log_that_cannot_be_written_changes_no_word(hospital, monkeypatch, file):
    def fail(*_):
        raise RuntimeError(CANARY)

    monkeypatch.setattr(client.app, "train_round", fail)
    (hospital.parent / "state" / file).mkdir(parents=True)  # nobody, not even root, writes into a folder
    answer = ask(hospital, training_request())
    assert refusal_code(answer) is RefusalCode.INTERNAL
    assert "state" not in repr(everything_in(answer))


def test_an_update_that_cannot_be_written_down_does_not_leave(hospital):
    (hospital.parent / "state" / "audit.jsonl").mkdir(parents=True)
    answer = ask(hospital, training_request())
    assert refusal_code(answer) is RefusalCode.INTERNAL
    assert set(answer) == {"envelope", "refusal"}
    # The charge stands and the update is sealed: once the disk is well again it is sent, not trained anew.
    (hospital.parent / "state" / "audit.jsonl").rmdir()
    assert refusal_code(ask(hospital, training_request())) is None


def test_what_is_no_error_is_not_swallowed(hospital):
    def interrupted(*_):
        raise KeyboardInterrupt

    from flwr.app import Context

    context = Context(
        run_id=1,
        node_id=7,
        node_config={"hospital-config": str(hospital)},
        state=RecordDict(),
        run_config={},
    )
    with pytest.raises(KeyboardInterrupt):
        answered(interrupted, hello(), context)


def test_a_hello_is_answered_with_public_facts_only(hospital):
    answer = ask(hospital, hello())
    assert set(answer) == {"envelope", "hospital"}
    facts = dict(answer["hospital"])
    assert set(facts) == {"name", "enrolled-patients", "schema-version", "version", "flwr"}
    assert (facts["name"], facts["enrolled-patients"], facts["schema-version"]) == (
        "north",
        30,
        SCHEMA_VERSION,
    )


def test_a_hello_of_another_schema_is_refused(hospital):
    request = hello()
    request.content["envelope"]["schema-version"] = 1
    assert refusal_code(ask(hospital, request)) is RefusalCode.SCHEMA


def test_a_foreign_kind_of_message_is_not_answered_with_data(hospital):
    request = Message(RecordDict({"x": ConfigRecord({"a": 1})}), 7, "query.patients")
    with pytest.raises(Exception, match=r"patients|No .* function"):
        ask(hospital, request)
