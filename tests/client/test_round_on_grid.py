"""Rounds whose update travels in whole numbers: rounded after the noise, sealed, sent again as it is."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, RecordDict
from safetensors.numpy import load

import client.round
from client.app import app
from client.training import plain
from common import messages
from common.errors import RefusalCode
from common.messages import refusal_code
from common.parameters import difference, to_record
from common.privacy.randomness import ReproducibleRandomness
from common.quantisation import Grid, levels_from, quantised
from common.serialisation import message_to_bytes
from tests.client.small_hospital import (
    ask,
    charges,
    envelope_of,
    everything_in,
    make_hospital,
    make_plan,
    training_request,
    weights_of,
)

WEIGHT = 30
GRID = Grid(bits=8, exponents=(-3, -4))


@pytest.fixture
def hospital(tmp_path, flower_identity):
    return make_hospital(tmp_path / "north", allow_non_private=True)


def grid_request(plan=None, *, grid=GRID, weight=WEIGHT, record=None, **key):
    """A training request that asks for whole numbers on `grid`, or on what `record` says."""
    plan = plan or make_plan(wire={"bits": grid.bits})
    request = training_request(plan, **key)
    request.content[messages.ENVELOPE]["encoding"] = messages.ENCODINGS[grid.bits]
    announced = messages.grid_to_record(grid, weight=weight)
    request.content[messages.GRID] = announced if record is None else record
    return request


def arrays_of(answer):
    (array,) = answer[messages.ARRAYS].values()
    return load(array.data)


def template_of_plan(plan):
    return {name: array.shape for name, array in weights_of(plan).items()}


@pytest.mark.parametrize("bits", [8, 4])
def test_an_answer_is_the_update_in_whole_numbers_and_the_same_scalars(hospital, bits):
    grid = replace(GRID, bits=bits)
    answer = ask(hospital, grid_request(grid=grid))
    assert set(answer) == {"envelope", "arrays", "metrics", messages.LEDGER_RECEIPT}
    assert set(answer["metrics"]) == messages.METRIC_WHITE_LIST
    asked = replace(envelope_of(weights_of(make_plan())), encoding=messages.ENCODINGS[bits])
    assert messages.Envelope.from_record(answer) == asked
    levels = levels_from(answer[messages.ARRAYS], template_of_plan(make_plan()), grid=grid, weight=WEIGHT)
    assert np.abs(levels.whole(slice(0, len(levels.fitting)))).max() > 3
    assert len(charges(hospital)) == 1


def test_the_same_question_gets_the_same_bytes_and_another_encoding_a_refusal(hospital):
    first = everything_in(ask(hospital, grid_request()))
    assert everything_in(ask(hospital, grid_request())) == first
    assert refusal_code(ask(hospital, training_request(make_plan(wire={"bits": 8})))) is RefusalCode.CONFLICT
    other_grid = ask(hospital, grid_request(grid=replace(GRID, exponents=(-2, -4))))
    assert everything_in(other_grid) == first  # it says on which grid it lies, and the server refuses it
    assert len(charges(hospital)) == 1


def test_rounding_sees_the_noised_update_alone(hospital, monkeypatch):
    """What is rounded is the difference of what private training gave, bit for bit, and nothing else."""
    results, rounded = [], []
    train, encoded = client.round.train_privately, client.round.encoded

    def watched(**arguments):
        results.append(train(**arguments))
        return results[-1]

    def seen(delta, grid, randomness, **number):
        rounded.append(delta)
        return encoded(delta, grid, randomness, **number)

    monkeypatch.setattr(client.round, "train_privately", watched)
    monkeypatch.setattr(client.round, "encoded", seen)
    plan = make_plan(wire={"bits": 8}, federation={"reproducible": True})
    answer = ask(hospital, grid_request(plan))
    expected = difference(results[0].parameters, weights_of(plan))
    assert {k: v.tobytes() for k, v in rounded[0].items()} == {k: v.tobytes() for k, v in expected.items()}
    stream = ReproducibleRandomness(0, "north").stream(purpose="rounding", round_number=1, step=0)
    by_hand = quantised(expected, grid=GRID, weight=WEIGHT, stream=stream)
    assert to_record(by_hand)["parameters"].data == answer[messages.ARRAYS]["parameters"].data


def test_two_runs_round_differently_unless_reproducible(hospital, monkeypatch):
    fixed = {name: array + np.float32(0.01) for name, array in weights_of(make_plan()).items()}
    result = plain.TrainingResult(parameters=fixed, steps=2, started_at=1.0, ended_at=2.0)
    monkeypatch.setattr(client.round, "train_privately", lambda **_: result)
    one, two = (arrays_of(ask(hospital, grid_request(run_id=run)))["levels"] for run in ("one", "two"))
    assert one.tobytes() != two.tobytes()


BAD_GRIDS = {
    "none": ConfigRecord(),
    "one spacing": ConfigRecord({"exponents": [-3], "weight": 30}),
    "too many": ConfigRecord({"exponents": [-3, -3, -3], "weight": 30}),
    "spacings as floats": ConfigRecord({"exponents": [-3.0, -3.0], "weight": 30}),
    "spacing nan": ConfigRecord({"exponents": [float("nan"), -3.0], "weight": 30}),
    "spacing far too large": ConfigRecord({"exponents": [101, -3], "weight": 30}),
    "spacing far too small": ConfigRecord({"exponents": [-3, -(2**40)], "weight": 30}),
    "no weight": ConfigRecord({"exponents": [-3, -3]}),
    "weight zero": ConfigRecord({"exponents": [-3, -3], "weight": 0}),
    "weight negative": ConfigRecord({"exponents": [-3, -3], "weight": -5}),
    "weight as float": ConfigRecord({"exponents": [-3, -3], "weight": 30.0}),
    "weight beyond all": ConfigRecord({"exponents": [-3, -3], "weight": 10**9 + 1}),
}


@pytest.mark.parametrize("kind", BAD_GRIDS)
def test_a_grid_that_makes_no_sense_is_refused_uncharged(hospital, kind):
    assert refusal_code(ask(hospital, grid_request(record=BAD_GRIDS[kind]))) is RefusalCode.WEIGHTS
    assert charges(hospital) == ()


@pytest.mark.parametrize("bits", [32, 4])
def test_an_encoding_that_is_not_the_plans_is_refused_uncharged(hospital, bits):
    request = grid_request(make_plan(wire={"bits": bits}))
    assert refusal_code(ask(hospital, request)) is RefusalCode.WEIGHTS
    assert charges(hospital) == ()


def test_a_real_message_of_a_large_model_is_a_quarter_of_float32_all_included(hospital):
    """Receipt, envelope, scalars and Flower's own headers, of a model of just over 500,000 parameters."""
    plan = make_plan(
        model={"name": "cnn-flatten"}, data={"image-size": 24}, wire={"bits": 8}, privacy={"local-steps": 1}
    )
    parameters = sum(array.size for array in weights_of(plan).values())
    assert 500_000 < parameters < 700_000
    noise = 2.0 / plan.privacy.sampling_rate * plan.training.learning_rate
    exponent = int(np.floor(np.log2(0.4 * noise)))
    grid = Grid(bits=8, exponents=(exponent,) * len(weights_of(plan)))
    request = grid_request(plan, grid=grid)
    context = Context(
        run_id=1, node_id=7, node_config={"hospital-config": str(hospital)}, state=RecordDict(), run_config={}
    )
    reply = app(request, context)
    assert refusal_code(reply.content) is None
    assert len(reply.content[messages.LEDGER_RECEIPT]["bytes"]) == messages.LARGEST_RECEIPT
    assert messages.content_bytes(reply.content) < len(message_to_bytes(reply)) <= 0.26 * 4 * parameters
