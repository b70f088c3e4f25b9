"""Fast per-patient gradients against plain autograd, one patient at a time."""

import numpy as np
import pytest
import torch
from torch import nn

from client.training.guard import TRAINABLE_LAYERS, guard_model
from common.models.names import MODELS
from common.models.private_layers import StandardisedConv2d
from common.models.recurrence import Recurrence
from common.models.registry import build_model
from common.models.series import with_real_steps
from tests.client.training.dp_oracle import (
    clipped_sum,
    oracle_clipped_sum,
    patient_gradient,
    random_rows,
    relative_error,
    small_network,
)
from tests.model_names import each_model, shape_of, spec_of

RAGGED = np.repeat(np.arange(6), [1, 5, 2, 1, 4, 3])


@pytest.mark.parametrize("max_rows", [1, 3, 5, 7, 100])
@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e3])
def test_clipped_sum_is_that_of_one_patient_at_a_time(max_rows, clip):
    model = small_network()
    inputs, targets = random_rows(RAGGED)
    expected = oracle_clipped_sum(model, inputs, targets, RAGGED, clip=clip)
    found = clipped_sum(model, inputs, targets, RAGGED, clip=clip, max_rows=max_rows)
    assert relative_error(found, expected) < 1e-5


def test_one_patient_with_one_image():
    model = small_network()
    inputs, targets = random_rows([0])
    gradient = patient_gradient(model, inputs, targets)
    assert relative_error(clipped_sum(model, inputs, targets, [0], clip=1e3), gradient) < 1e-5
    assert float(clipped_sum(model, inputs, targets, [0], clip=0.01).norm()) == pytest.approx(0.01, rel=1e-6)


def test_a_patient_counts_once_however_many_images():
    model = small_network()
    inputs, targets = random_rows([0])
    once = clipped_sum(model, inputs, targets, [0], clip=1e3)
    five_times = clipped_sum(model, inputs.repeat(5, 1, 1, 1), targets.repeat(5), [0] * 5, clip=1e3)
    assert relative_error(five_times, once) < 1e-5


@pytest.mark.parametrize("name", each_model())
def test_models_of_the_registry_against_one_patient_at_a_time(name):
    size = 16 if MODELS[name].deep else 28
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(spec_of(name, image_size=size))
    units = np.repeat(np.arange(3), [1, 3, 2])
    inputs, targets = random_rows(units, shape=shape_of(spec_of(name, image_size=size)))
    inputs = with_real_steps(model, inputs)
    if MODELS[name].deep:
        # Among millions of ReLUs and maxima some are so near a tie that float32 rounds them to either side.
        model, inputs = model.double(), inputs.double()
    expected = oracle_clipped_sum(model, inputs, targets, units, clip=0.5)
    found = clipped_sum(model, inputs, targets, units, clip=0.5, max_rows=4)
    assert relative_error(found, expected) < 1e-4


LAYERS = [
    (nn.Conv1d(2, 3, 3, padding=1, stride=2), (2, 9)),
    (nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), (2, 7, 6)),
    (nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2), (4, 8, 7)),
    (nn.Conv2d(2, 3, (5, 3), padding="same"), (2, 6, 5)),
    (nn.Conv3d(2, 3, 3, padding=1, stride=(1, 2, 1)), (2, 4, 5, 3)),
    (StandardisedConv2d(2, 5, 3, stride=2, padding=1), (2, 7, 6)),
    (nn.Linear(5, 4), (3, 5)),
    (nn.GroupNorm(2, 4), (4, 3, 3)),
    (nn.LayerNorm([3, 4]), (2, 3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
def test_every_allowed_layer_has_the_gradient_of_plain_autograd(layer, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = layer(torch.zeros(1, *shape)).numel()
        model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 2))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    guard_model(model, input_shape=shape)
    units = [0, 0, 1, 2, 2, 2]
    inputs, targets = random_rows(units, shape=shape)
    for clip in (0.1, 1e3):
        expected = oracle_clipped_sum(model, inputs, targets, units, clip=clip)
        assert relative_error(clipped_sum(model, inputs, targets, units, clip=clip), expected) < 1e-5


def test_every_allowed_layer_is_in_that_list():
    # Recurrences have a test of their own: test_rows_of_series.py.
    assert {type(layer) for layer, _ in LAYERS} | {Recurrence} == set(TRAINABLE_LAYERS)
