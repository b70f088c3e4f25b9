"""Reconstruction of films from updates: the exact leak through the production path, and the measure."""

import numpy as np
import pytest
import torch

import simulations.audits.inversion as inversion
from client.images.phantoms import CLASSES, hospital_phantoms
from common.config import ModelSpec
from common.models.registry import build_model, initial_parameters, load_parameters
from common.tasks import make_task
from simulations.audits.reconstruction import (
    PublicImages,
    Seen,
    linear_leak,
    match_gradients,
    most_probable,
    similarity,
)

SIDE = 28
TASK = make_task("classification", CLASSES)


def films(count, seed=3):
    return hospital_phantoms(hospital=0, num_patients=count, image_size=SIDE, seed=seed).images[:count] / 255


def seen(model_name, gradient, noise_stddev=0.0):
    spec = ModelSpec(name=model_name, channels=1, image_size=SIDE, num_outputs=2)
    model = build_model(spec)
    load_parameters(model, initial_parameters(spec, seed=0))
    return Seen(
        model=model, task=TASK, gradient=gradient(model), l2_clip_norm=None, noise_stddev=noise_stddev
    )


def slow_similarity(first, second):
    """Wang et al. 2004, equation 13, window by window."""
    values = []
    for top in range(len(first) - 6):
        for left in range(len(first) - 6):
            x = first[top : top + 7, left : left + 7].ravel()
            y = second[top : top + 7, left : left + 7].ravel()
            (xx, xy), (_, yy) = np.cov(x, y)
            values.append(
                (2 * x.mean() * y.mean() + 1e-4)
                * (2 * xy + 9e-4)
                / ((x.mean() ** 2 + y.mean() ** 2 + 1e-4) * (xx + yy + 9e-4))
            )
    return np.mean(values)


def test_similarity_is_that_of_the_slow_way():
    first, second = films(2)
    assert similarity(first, second) == pytest.approx(slow_similarity(first, second), abs=1e-12)
    assert similarity(first, first) == pytest.approx(1)
    assert abs(similarity(first, np.random.default_rng(0).random((SIDE, SIDE)))) < 0.15


@pytest.mark.parametrize("label", [0, 1])
def test_without_privacy_the_update_of_a_linear_model_is_the_film(label):
    film = films(1)[0]
    returned = linear_leak(inversion.observe("softmax", film, label, private=False), side=SIDE)
    assert np.abs(returned - film).max() < 1e-3  # a quarter of a grey level


def test_under_privacy_it_is_not():
    """The film's share of the gradient is 1 in norm, the noise 1 in each of 1570 numbers."""
    film = films(1)[0]
    returned = linear_leak(inversion.observe("softmax", film, 1, private=True), side=SIDE)
    assert similarity(returned, film) < 0.5


def test_gradients_of_a_convolutional_model_are_matched():
    film = films(1)[0]
    guess = match_gradients(
        inversion.observe("cnn-small", film, 1, private=False), side=SIDE, iterations=150, restarts=1, seed=0
    )
    assert similarity(guess, film) > 0.6  # a few steps of many


def test_without_evidence_the_most_probable_film_is_the_public_mean():
    def nothing(model):
        return tuple(torch.randn_like(p).mul(1e6) for p in model.parameters())

    public = PublicImages.of(films(50))
    guess = most_probable(seen("softmax", nothing, noise_stddev=1e6), public, iterations=20)
    assert guess == pytest.approx(public.mean, abs=0.01)


def test_principal_components_carry_the_spread_of_the_public_images():
    images = films(40)
    public = PublicImages.of(images)
    assert np.sum(public.directions**2) == pytest.approx(images.var(axis=0, ddof=1).sum())
