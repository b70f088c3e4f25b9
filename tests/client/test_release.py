"""The door lets white-listed values out and nothing else."""

import hashlib
import json
import os

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from client.outbox import SealedAnswer
from client.release import HELLO_WHITE_LIST, Door, content_sha256
from common import messages
from common.errors import PrivacyError, RefusalCode
from common.messages import Envelope, RoundKey


@pytest.fixture
def door(tmp_path):
    return Door(tmp_path / "audit.jsonl")


@pytest.fixture
def request_message(flower_identity):
    return Message(RecordDict(), 1, messages.TRAIN)


ENVELOPE = Envelope(key=RoundKey(run_id="run", attempt=1, round_number=3, model_hash="f" * 64))


def sealed(**metrics):
    return SealedAnswer(delta={"w": np.ones((2, 2), np.float32)}, metrics={"num-examples": 40, **metrics})


def test_an_update_holds_envelope_delta_and_white_listed_scalars_only(door, request_message):
    reply = door.update(request_message, ENVELOPE, sealed(steps=2))
    assert set(reply.content) == {"envelope", "arrays", "metrics"}
    assert set(reply.content["metrics"]) == {"num-examples", "steps"}
    assert Envelope.from_record(reply.content) == ENVELOPE


@pytest.mark.parametrize("name", ["train-loss", "accuracy", "num-rows", "gradient-norm"])
def test_no_other_scalar_leaves(door, request_message, name):
    with pytest.raises(PrivacyError, match=name):
        door.update(request_message, ENVELOPE, sealed(**{name: 0.5}))


def test_the_introduction_holds_exactly_the_public_facts(door, request_message):
    facts = dict.fromkeys(HELLO_WHITE_LIST, 1)
    assert set(door.introduction(request_message, ENVELOPE, facts).content) == {"envelope", "hospital"}
    with pytest.raises(PrivacyError):
        door.introduction(request_message, ENVELOPE, {**facts, "num-positive": 3})


def test_a_refusal_is_one_enumerated_word(door, request_message):
    reply = door.refusal(request_message, ENVELOPE, RefusalCode.BUDGET)
    assert dict(reply.content["refusal"]) == {"code": "budget-spent"}
    assert set(reply.content) == {"envelope", "refusal"}


def noted(folder):
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


COUNTS = {"confusion": [1.5, 2.0, 3.0, 4.0], "scores": [0.5] * 20}
CERTIFICATE = '{"kind": "release"}'
ANSWERS = {
    "update": lambda door, request: door.update(
        request, ENVELOPE, sealed(epsilon=0.5, delta=1e-4), ledger_receipt=b"x" * 64
    ),
    "evaluation": lambda door, request: door.evaluation(
        request, ENVELOPE, COUNTS, {"epsilon": 1.0, "delta": 1e-3}, ledger_receipt=b"x" * 64
    ),
    "introduction": lambda door, request: door.introduction(
        request, ENVELOPE, dict.fromkeys(HELLO_WHITE_LIST, 1)
    ),
    "receipt": lambda door, request: door.receipt(request, ENVELOPE, "e" * 64, certificate=CERTIFICATE),
    "refusal policy": lambda door, request: door.refusal(request, ENVELOPE, RefusalCode.POLICY),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_the_line_says_all_that_left(door, request_message, tmp_path, what):
    content = ANSWERS[what](door, request_message).content
    (line,) = noted(tmp_path)
    assert line["what"] == what
    assert line["bytes"] == sum(record.count_bytes() for record in content.values())
    assert line["sha256"] == content_sha256(content)
    assert {name: record["names"] for name, record in line["records"].items()} == {
        name: sorted(record) for name, record in content.items()
    }
    assert sum(record["bytes"] for record in line["records"].values()) == line["bytes"]


@pytest.mark.parametrize("what", ANSWERS)
def test_what_cannot_be_written_down_does_not_leave(door, request_message, tmp_path, what):
    (tmp_path / "audit.jsonl").mkdir()  # nobody, not even root, writes into a folder
    with pytest.raises(OSError, match="audit"):
        ANSWERS[what](door, request_message)


def test_a_line_that_is_written_in_part_holds_the_answer_back(door, request_message, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:10]))
    with pytest.raises(OSError, match="in part"):
        ANSWERS["update"](door, request_message)


@pytest.mark.parametrize("record", ["envelope", "arrays", "metrics", "ledger-receipt"])
def test_the_hash_covers_every_record(door, request_message, record):
    content = ANSWERS["update"](door, request_message).content
    changed = dict(content)
    del changed[record]
    assert content_sha256(RecordDict(changed)) != content_sha256(content)


@pytest.mark.parametrize(("record", "value"), [("metrics", 0.25), ("ledger-receipt", b"y" * 64)])
def test_the_hash_covers_every_value(door, request_message, record, value):
    content = ANSWERS["update"](door, request_message).content
    before = content_sha256(content)
    content[record][next(iter(content[record]))] = value
    assert content_sha256(content) != before


def test_the_line_says_the_cost_and_which_counts(door, request_message, tmp_path):
    for answer in ANSWERS.values():
        answer(door, request_message)
    update, evaluation, introduction, receipt, refusal = noted(tmp_path)
    assert update["cost"] == {"epsilon": 0.5, "delta": 1e-4, "purpose": "training"}
    assert evaluation["cost"] == {"epsilon": 1.0, "delta": 1e-3, "purpose": "evaluation"}
    assert evaluation["records"]["counts"]["lengths"] == {"confusion": 4, "scores": 20}
    assert [line["cost"] for line in (introduction, receipt, refusal)] == [None] * 3
    assert update["sealed_sha256"] == sealed().sha256
    assert receipt["model_sha256"] == "e" * 64
    assert receipt["certificate_sha256"] == hashlib.sha256(CERTIFICATE.encode()).hexdigest()


def test_empty_words_are_written_down_too(door, request_message, tmp_path):
    nobody = Envelope(key=RoundKey(run_id="", attempt=0, round_number=0, model_hash=""))
    door.refusal(request_message, nobody, RefusalCode.SCHEMA)
    door.receipt(request_message, nobody, "", certificate="")
    assert [line["bytes"] > 0 for line in noted(tmp_path)] == [True, True]
