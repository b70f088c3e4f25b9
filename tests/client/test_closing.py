"""The end of a run: the hospital keeps the model that was announced, and no other."""

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from client.received_models import received_models
from common import messages
from common.errors import RefusalCode
from common.files import manifest_problem
from common.messages import refusal_code
from common.parameters import parameters_sha256, read_safetensors, to_record
from common.settings import to_nested
from tests.client.small_hospital import (
    ask,
    envelope_of,
    make_hospital,
    make_plan,
    training_request,
    weights_of,
)

RUN = "lungs-20260101-000000-abcd"


@pytest.fixture
def hospital(tmp_path, flower_identity):
    """A hospital that has trained in RUN."""
    toml = make_hospital(tmp_path / "north")
    assert messages.ARRAYS in ask(toml, training_request(run_id=RUN))
    return toml


def closing(*, run_id=RUN, weights=None, description=None, announced=None, card="# A model") -> Message:
    plan = make_plan()
    weights = weights_of(plan) if weights is None else weights
    sha256 = parameters_sha256(weights)
    if description is None:
        description = json.dumps({"sha256": sha256, "spec": to_nested(plan.model_spec)})
    content = {
        messages.ENVELOPE: envelope_of(weights, run_id=run_id).to_record(),
        messages.ARRAYS: to_record(weights),
        messages.MODEL: ConfigRecord({"json": description, "sha256": announced or sha256, "card": card}),
    }
    return Message(RecordDict(content), 7, messages.CLOSING)


def models_of(toml):
    return toml.parent / "state" / "models"


def test_the_model_is_kept_with_card_and_hashes_and_confirmed(hospital):
    weights = weights_of(make_plan())
    answer = ask(hospital, closing())
    assert set(answer) == {"envelope", "receipt"}
    assert set(answer["receipt"]) == {"sha256", "certificate"}
    assert answer["receipt"]["sha256"] == parameters_sha256(weights)
    folder = models_of(hospital) / RUN
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "model.json",
        "MODEL_CARD.md",
        "certificate.json",
        "manifest.json",
    }
    assert manifest_problem(folder, required=["model.safetensors"]) is None
    assert parameters_sha256(read_safetensors(folder / "model.safetensors")) == parameters_sha256(weights)
    assert all((folder / name).stat().st_mode & 0o077 == 0 for name in ("model.safetensors", "MODEL_CARD.md"))
    assert [place.stat().st_mode & 0o777 for place in (folder, folder.parent)] == [0o700, 0o700]
    (listed,) = received_models(models_of(hospital))
    assert (listed["run_id"], listed["model"], listed["state"]) == (RUN, "softmax", "whole")


def test_a_model_of_a_run_without_this_hospital_is_not_kept(hospital):
    answer = ask(hospital, closing(run_id="somebody-elses-run"))
    assert refusal_code(answer) is RefusalCode.POLICY
    assert not models_of(hospital).exists()


def test_a_model_that_comes_twice_is_kept_once(hospital):
    assert dict(ask(hospital, closing())["receipt"]) == dict(ask(hospital, closing())["receipt"])
    assert [path.name for path in models_of(hospital).iterdir()] == [RUN]


def test_an_altered_model_is_listed_as_altered(hospital):
    ask(hospital, closing())
    file = models_of(hospital) / RUN / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (listed,) = received_models(models_of(hospital))
    assert "does not match" in listed["state"]


def other_shape():
    return {**weights_of(make_plan()), "output.bias": np.zeros(5, np.float32)}


def described(**changes):
    spec = {**to_nested(make_plan().model_spec), **changes}
    return json.dumps({"sha256": "", "spec": spec})


@pytest.mark.parametrize(
    "bad",
    [
        {"announced": "0" * 64},
        {"weights": other_shape()},
        {"description": "no json"},
        {"description": "[1]"},
        {"description": "7"},
        {"description": "{}"},
        {"description": described(name=7)},
        {"description": described(depth=3)},
        {"description": described(**{"num-outputs": 3})},
        {"description": "x" * 1_000_001},
        {"card": "x" * 1_000_001},
        {"run_id": "../../elsewhere"},
        {"run_id": ".hidden"},
        {"run_id": ""},
        {"run_id": "a/b"},
        {"run_id": ".."},
    ],
    ids=lambda bad: f"{next(iter(bad))}={str(next(iter(bad.values())))[:24]}",
)
def test_a_model_that_is_not_what_it_says_is_not_kept(hospital, tmp_path, bad):
    before = set(tmp_path.rglob("*"))
    assert refusal_code(ask(hospital, closing(**bad))) is RefusalCode.WEIGHTS
    assert {path.name for path in set(tmp_path.rglob("*")) - before} <= {"hospital.log"}


def test_a_model_of_a_run_in_which_it_did_not_train_is_not_kept(hospital, tmp_path):
    before = set(tmp_path.rglob("*"))
    assert refusal_code(ask(hospital, closing(run_id="somebody-elses-run"))) is RefusalCode.POLICY
    assert {path.name for path in set(tmp_path.rglob("*")) - before} <= {"hospital.log"}


def test_an_unknown_model_is_not_kept(hospital):
    answer = ask(hospital, closing(description=described(name="transformer")))
    assert refusal_code(answer) is RefusalCode.MODEL


def test_a_closing_without_description_is_refused(hospital):
    request = closing()
    del request.content[messages.MODEL]
    assert refusal_code(ask(hospital, request)) is RefusalCode.WEIGHTS
