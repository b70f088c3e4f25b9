"""The door lets white-listed values out and nothing else."""

import json

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from client.outbox import SealedAnswer
from client.release import HELLO_WHITE_LIST, Door
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


def test_every_answer_is_in_the_audit_log(door, request_message, tmp_path):
    door.update(request_message, ENVELOPE, sealed())
    door.receipt(request_message, ENVELOPE, "e" * 64)
    door.refusal(request_message, ENVELOPE, RefusalCode.POLICY)
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines] == ["update", "receipt", "refusal policy"]
    assert lines[0]["bytes"] > 16
    assert lines[0]["sha256"] == sealed().sha256
