"""Integrated Gradients keep their axiom, and each method follows the model and points at what was planted."""

import numpy as np
import pytest
import torch
from torch import nn

from client.images.phantoms import hospital_phantoms
from client.prediction.attributions import class_score, integrated_gradients, smoothed
from client.prediction.heat_map import heat_maps
from client.prediction.heat_method import HeatMethod
from common.models.registry import build_model, initial_parameters, load_parameters
from common.preprocessing import Preprocessing
from tests.client.stored_models import SIZE, spec_of, train_on_phantoms
from tests.client.test_case_pages import SIDE, pointing_game

TANH = {"activation": "tanh"}


def tanh_spec(size):
    return spec_of(size=size).model_copy(update=TANH)


@pytest.fixture(scope="module")
def trained():
    return train_on_phantoms(tanh_spec(SIDE), patients=60, epochs=4)


def network_of(spec, weights):
    network = build_model(spec).eval()
    load_parameters(network, weights)
    return network


def films(side, *, hospital=6, patients=12):
    found = hospital_phantoms(hospital=hospital, num_patients=patients, image_size=side, seed=2)
    return found.images[found.labels == 1][:, None]


def completeness_errors(network, images):
    """|sum of attributions - difference of scores| / |difference|, from black, for the finding."""
    prepared = Preprocessing(image_size=images.shape[-1], channels=1)
    inputs = torch.from_numpy(prepared.standardise(images))
    black = torch.full_like(inputs[:1], -2)
    classes = torch.ones(len(inputs), dtype=torch.int64)
    found = integrated_gradients(network, inputs, classes, baseline=black)
    with torch.no_grad():
        at_black = class_score(network(black.expand_as(inputs)), classes)
        difference = class_score(network(inputs), classes) - at_black
    return ((found.sum(dim=(1, 2, 3)) - difference).abs() / difference.abs()).numpy()


def test_attributions_sum_to_the_difference_of_the_scores(trained):
    assert completeness_errors(network_of(tanh_spec(SIDE), trained), films(SIDE)).max() < 0.01


def test_a_linear_model_is_attributed_exactly():
    random = torch.Generator().manual_seed(0)
    layer = nn.Linear(12, 3)
    network = nn.Sequential(nn.Flatten(), layer)
    inputs, baseline = (torch.randn(4, 3, 2, 2, generator=random) for _ in range(2))
    classes = torch.tensor([0, 1, 2, 1])
    found = integrated_gradients(network, inputs, classes, baseline=baseline, steps=3)
    weight = layer.weight[classes] - (layer.weight.sum(dim=0) - layer.weight[classes]) / 2
    torch.testing.assert_close(found.flatten(1), weight * (inputs - baseline).flatten(1))


def test_smoothing_keeps_the_sum_and_the_place():
    maps = torch.zeros(1, 64, 64)
    maps[0, 30, 21] = 5
    found = smoothed(maps)
    assert found.sum().item() == pytest.approx(5, rel=1e-4)
    assert divmod(int(found.argmax()), 64) == (30, 21)
    assert found.max() < 0.1


@pytest.mark.parametrize("method", HeatMethod)
def test_other_weights_give_another_map_by_each_method(trained, method):
    """Sanity check of Adebayo et al., arXiv 1810.03292: with random weights the map is another one."""
    images, spec = films(SIDE), tanh_spec(SIDE)
    classes = np.ones(len(images), np.int64)
    prepared = Preprocessing(image_size=SIDE, channels=1)
    maps = []
    for weights in (trained, initial_parameters(spec, 7)):
        found = heat_maps(network_of(spec, weights), images, classes, preprocessing=prepared, method=method)
        assert found.min() >= 0
        assert found.max() <= 1
        maps.append(found.reshape(len(images), -1))
    alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(*maps, strict=True) if a.any() and b.any()]
    assert np.mean(np.nan_to_num(alike)) < 0.5


@pytest.mark.parametrize("name", ["softmax", "scattering"])
def test_models_without_maps_have_integrated_gradients(name):
    spec = spec_of(name)
    random = np.random.default_rng(0)
    weights = {n: random.normal(0, 1, w.shape) for n, w in initial_parameters(spec, 0).items()}
    network = network_of(spec, {n: w.astype(np.float32) for n, w in weights.items()})
    images = films(SIZE, patients=2)[:1]
    prepared, classes = Preprocessing(image_size=SIZE, channels=1), np.ones(len(images), np.int64)
    method = HeatMethod.INTEGRATED_GRADIENTS
    (found,) = heat_maps(network, images, classes, preprocessing=prepared, method=method)
    assert found.shape == (SIZE, SIZE)
    assert found.max() == pytest.approx(1)


@pytest.mark.audit
@pytest.mark.parametrize(
    ("seed", "activation"),
    [
        pytest.param(
            10,
            "tanh",
            # A missed bar (docs/predict.md): anything else that goes wrong is red, and so is a hit.
            marks=pytest.mark.xfail(reason="0.62 of 0.8", strict=True, raises=AssertionError),
        ),
        (11, "tanh"),
        (12, "tanh"),
        (10, "relu"),
        (11, "relu"),
        (12, "relu"),
    ],
)
def test_the_heat_of_unseen_models_and_phantoms_lies_there_four_times_of_five(seed, activation):
    """Seeds and hospitals on which nothing about the method was chosen."""
    spec = spec_of(size=SIDE).model_copy(update={"activation": activation})
    weights = train_on_phantoms(spec, epochs=8, seed=seed)
    hits = pointing_game(spec, weights, patients=300)[0]
    print(f"{activation} seed {seed}: {hits:.3f}")
    assert hits >= 0.8
    assert np.median(completeness_errors(network_of(spec, weights), films(SIDE))) < 0.01
