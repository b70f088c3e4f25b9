"""Which way a convolution is computed: by shapes and this machine, never by what images or weights hold."""

import hashlib

import pytest
import torch
from torch import nn

from client.training import kernel_choice
from client.training.convolution_rows import Geometry, possible_ways, weight_rows
from client.training.kernel_choice import way_of
from client.training.private import train_privately
from client.training.row_places import place_matters
from common.config import TrainingConfig
from common.preprocessing import Preprocessing
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from tests.client.training.dp_oracle import TASK, examples_of, make_plan

DEEP = nn.Conv2d(64, 64, 3)
"""Few positions and many weights on 6 x 6: two ways are possible."""


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(kernel_choice, "_CHOSEN", {})


def shapes(layer=DEEP, rows=4, side=6, fill=None):
    inputs = torch.randn(rows, layer.in_channels, side, side)
    if fill is not None:
        inputs.fill_(fill)
    with torch.no_grad():
        return inputs, layer(inputs), Geometry.of(layer)


def test_two_ways_are_possible_here():
    assert len(possible_ways(*shapes())) == 2


def test_what_is_tried_holds_nothing_of_images_or_weights(monkeypatch):
    seen = []

    def noting(way, inputs, gradient, geometry):
        digests = [hashlib.sha256(values.numpy().tobytes()).hexdigest() for values in (inputs, gradient)]
        seen.append((way, *digests))
        return weight_rows(way, inputs, gradient, geometry)

    monkeypatch.setattr(kernel_choice, "weight_rows", noting)
    tried = []
    for fill in (None, None, float("nan"), 1e30, 0.0):
        inputs, outputs, geometry = shapes(fill=fill)
        kernel_choice._CHOSEN.clear()
        way_of(inputs, outputs, geometry, fixed=False)
        tried.append([*seen])
        seen.clear()
    assert tried[0]
    assert all(other == tried[0] for other in tried)


def test_it_is_tried_once_for_each_shape(monkeypatch):
    calls = []
    monkeypatch.setattr(kernel_choice, "_fastest", lambda ways, *_: calls.append(ways) or ways[1])
    ways = {way_of(*shapes(), fixed=False) for _ in range(3)}
    assert len(ways) == 1
    assert len(calls) == 1
    way_of(*shapes(rows=5), fixed=False)
    way_of(*shapes(nn.Conv2d(64, 64, 3, padding=1), side=4), fixed=False)
    assert len(calls) == 3


def test_a_fixed_table_measures_nothing(monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(kernel_choice, "_fastest", never)
    found = shapes()
    assert way_of(*found, fixed=True) == possible_ways(*found)[0]
    assert kernel_choice._CHOSEN == {}


def test_the_global_generator_is_left_alone():
    found, state = shapes(), torch.get_rng_state()
    way_of(*found, fixed=False)
    assert torch.equal(torch.get_rng_state(), state)


def train(randomness, *, fill=0.0):
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3, stride=2), nn.Tanh(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(fill)
    train_privately(
        model=model,
        task=TASK,
        examples=examples_of([1, 2, 1]),
        preprocessing=Preprocessing(image_size=8, channels=1),
        plan=make_plan(sampling_rate=1.0, max_rows_per_unit=2),
        training=TrainingConfig(),
        round_number=1,
        num_rounds=1,
        randomness=randomness,
        device=torch.device("cpu"),
    )
    return model


def test_training_computes_by_the_ways_that_the_trial_of_places_was_made_with(monkeypatch):
    """Were a way chosen after it, places might matter in what nobody tried."""
    import client.training.private as training

    known = []

    def noting(*arguments, **named):
        found = place_matters(*arguments, **named)
        known.append(set(kernel_choice._CHOSEN))
        return found

    monkeypatch.setattr(training, "place_matters", noting)
    train(SecureRandomness())
    assert known[0]
    assert set(kernel_choice._CHOSEN) == known[0]


def test_a_reproducible_run_takes_the_fixed_table(monkeypatch):
    train(ReproducibleRandomness(1, "here"))
    assert kernel_choice._CHOSEN == {}
