"""The models of the registry, for tests that try each: what is slow only where slow tests run."""

import pytest

from common.config import ModelSpec
from common.models.names import MODELS, model_names

OF_SERIES = tuple(name for name in model_names() if MODELS[name].series)
SHALLOW = tuple(name for name in model_names() if not MODELS[name].deep and name not in OF_SERIES)
STEPS = 3
DEEP = tuple(name for name in model_names() if MODELS[name].deep)
FIRST_OF_FAMILY = ("mobilenet-v2", "densenet121", "vgg11", "resnet18")


def each_model(*, deep=FIRST_OF_FAMILY, series=True):
    """Parameters of a test: all models; deep ones that are not in `deep` are left to `make faults`.

    series: whether those of series, too.
    """
    slow = [name for name in DEEP if name not in deep]
    names = [name for name in model_names() if series or name not in OF_SERIES]
    return [pytest.param(name, marks=pytest.mark.faults if name in slow else ()) for name in names]


def spec_of(name, *, channels=1, image_size=28, num_outputs=2, activation="tanh"):
    """A model of the registry; those of series for series of STEPS."""
    return ModelSpec(
        name=name,
        channels=channels,
        image_size=image_size,
        num_outputs=num_outputs,
        activation=activation,
        steps=STEPS if name in OF_SERIES else 1,
    )


def shape_of(spec):
    """Shape of one input of a model."""
    if spec.steps == 1:
        return (spec.channels, spec.image_size, spec.image_size)
    return (spec.steps, spec.channels * spec.image_size**2 + 2)
