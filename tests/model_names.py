"""The models of the registry, for tests that try each: what is slow only where slow tests run."""

import pytest

from common.models.names import MODELS, model_names

SHALLOW = tuple(name for name in model_names() if not MODELS[name].deep)
DEEP = tuple(name for name in model_names() if MODELS[name].deep)
FIRST_OF_FAMILY = ("mobilenet-v2", "densenet121", "vgg11", "resnet18")


def each_model(*, deep=FIRST_OF_FAMILY):
    """Parameters of a test: all models; deep ones that are not in `deep` are left to `make faults`."""
    slow = [name for name in DEEP if name not in deep]
    return [pytest.param(name, marks=pytest.mark.faults if name in slow else ()) for name in model_names()]
