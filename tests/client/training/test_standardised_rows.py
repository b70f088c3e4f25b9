"""Convolutions with standardised kernels: values by hand, and private gradients of the weights themselves."""

import numpy as np
import pytest
import torch
from torch import nn

from client.training.convolution_rows import WAYS
from client.training.guard import guard_model
from client.training.row_places import place_matters
from common.config import ModelSpec
from common.errors import ModelError
from common.models.private_layers import StandardisedConv2d, standardised
from common.models.registry import build_model, initial_parameters, parameter_template
from tests.client.training.dp_oracle import clipped_sum, oracle_clipped_sum, random_rows, relative_error

RAGGED = np.repeat(np.arange(4), [1, 3, 2, 1])


def spec_of(name, *, size=28, steps=1, standardise=True):
    return ModelSpec(
        name=name,
        channels=1,
        image_size=size,
        num_outputs=2,
        steps=steps,
        weight_standardisation=standardise,
    )


def test_kernels_have_mean_0_and_variance_1():
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    kernels = standardised(weight).flatten(1)
    torch.testing.assert_close(kernels.mean(1), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(kernels.var(1, unbiased=False), torch.ones(6))
    assert torch.isfinite(standardised(torch.full((2, 1, 3, 3), 7.0))).all()


@pytest.mark.parametrize("name", ["cnn1", "cnn-small", "cnn-flatten", "mobilenet-v2", "resnet18", "lstm"])
def test_every_convolution_is_standardised_with_the_same_weights(name):
    steps = 2 if name == "lstm" else 1
    model = build_model(spec_of(name, steps=steps))
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert convolutions
    assert {type(layer) for layer in convolutions} == {StandardisedConv2d}
    plain = spec_of(name, steps=steps, standardise=False)
    assert not any(type(layer) is StandardisedConv2d for layer in build_model(plain).modules())
    assert parameter_template(spec_of(name, steps=steps)) == parameter_template(plain)
    first, second = (initial_parameters(spec, 1) for spec in (spec_of(name, steps=steps), plain))
    assert all(np.array_equal(first[key], second[key]) for key in second)


@pytest.mark.parametrize("name", ["softmax", "scattering"])
def test_models_without_convolutions_refuse_it(name):
    with pytest.raises(ModelError, match="no convolutions to standardise"):
        build_model(spec_of(name))


@pytest.mark.parametrize("name", ["cnn1", "cnn", "cnn-small", "gru"])
@pytest.mark.parametrize("clip", [1e-2, 1e3])
def test_clipped_sum_is_that_of_one_patient_at_a_time(name, clip):
    steps = 3 if name == "gru" else 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(spec_of(name, steps=steps))
    shape = (1, 28, 28) if steps == 1 else (3, 28**2 + 2)
    inputs, targets = random_rows(RAGGED, shape=shape)
    if steps > 1:
        inputs[..., -2] = 1.0
    guard_model(model, input_shape=shape)
    expected = oracle_clipped_sum(model, inputs, targets, RAGGED, clip=clip)
    found = clipped_sum(model, inputs, targets, RAGGED, clip=clip, max_rows=4)
    assert relative_error(found, expected) < 2e-5
    assert not place_matters(model, input_shape=shape, rows=16)


LAYERS = [(1, 4, 3, 1, 1), (8, 6, 3, 1, 1), (8, 6, 3, 2, 2), (64, 64, 3, 1, 1)]


@pytest.mark.parametrize("way", [way for way in WAYS if way != "product"])
@pytest.mark.parametrize("numbers", LAYERS)
def test_every_way_gives_the_gradient_of_the_weights(monkeypatch, way, numbers):
    in_channels, out_channels, kernel, stride, groups = numbers
    if way == "bands" and (groups > 1 or stride > 1):
        pytest.skip("no bands")
    monkeypatch.setattr("client.training.per_row_layers.way_of", lambda *_, fixed: way)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = StandardisedConv2d(in_channels, out_channels, kernel, stride, padding=1, groups=groups)
        model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
        model(torch.zeros(1, in_channels, 5, 4))
    inputs, targets = random_rows(RAGGED, shape=(in_channels, 5, 4))
    expected = oracle_clipped_sum(model, inputs, targets, RAGGED, clip=0.3)
    assert relative_error(clipped_sum(model, inputs, targets, RAGGED, clip=0.3), expected) < 1e-5


def test_without_the_choice_of_ways_a_product_is_never_left_unformed():
    layer = StandardisedConv2d(64, 64, 3, padding=1)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(64 * 4, 2))
    inputs, targets = random_rows(RAGGED, shape=(64, 2, 2))
    expected = oracle_clipped_sum(model, inputs, targets, RAGGED, clip=0.3)
    assert relative_error(clipped_sum(model, inputs, targets, RAGGED, clip=0.3), expected) < 1e-5
