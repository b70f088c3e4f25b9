"""Models by name, and their weights as named float32 arrays."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from common.config import ModelSpec
from common.errors import ModelError
from common.models.convolutional import BUILDERS
from common.models.names import MODELS, model_names, steps_problem
from common.models.private_layers import standardise_weights

__all__ = [
    "build_model",
    "initial_parameters",
    "load_parameters",
    "model_names",
    "parameter_template",
    "read_parameters",
]


def build_model(spec: ModelSpec) -> nn.Module:
    """Build the network of `spec` with torch's random weights, in training mode.

    It maps float32 (rows, channels, image_size, image_size), or with `steps` above 1 series as
    `common.models.series` has them, to (rows, num_outputs), treats every row alone and remembers nothing;
    what it has beside parameters are constants. Raises ModelError for an unknown name, an image too small for
    the layers, or a model for series where there are none and the reverse.
    """
    if spec.name not in MODELS:
        raise ModelError(f"there is no model {spec.name!r}", fix=f"choose one of {', '.join(model_names())}")
    if problem := steps_problem(spec.name, spec.steps):
        raise ModelError(problem, fix="choose another --model, or other data")
    minimum = MODELS[spec.name].minimum_image_size
    if spec.image_size < minimum:
        raise ModelError(
            f"images of {spec.image_size} px are too small for {spec.name}",
            why=f"its layers need at least {minimum} px",
            fix="choose a larger --image-size, or the model softmax",
        )
    model = _builder(spec.name)(spec)
    if spec.weight_standardisation and not standardise_weights(model):
        raise ModelError(
            f"the model {spec.name} has no convolutions to standardise",
            fix="leave weight-standardisation out",
        )
    return model


def initial_parameters(spec: ModelSpec, seed: int) -> dict[str, np.ndarray]:
    """Make the weights that a federation starts from: the same bits for the same spec and seed.

    torch's global random state is as before afterwards.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: it would also reseed the GPUs, whose state is not put back.
        torch.default_generator.manual_seed(seed)
        return read_parameters(build_model(spec))


def parameter_template(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter in the model's order; allocates no weights."""
    with torch.device("meta"):
        model = build_model(spec)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def load_parameters(model: nn.Module, parameters: Mapping[str, np.ndarray]) -> None:
    """Copy float32 arrays into `model`; raises ModelError, and changes nothing, unless all of them fit."""
    own = dict(model.named_parameters())
    missing, foreign = sorted(own.keys() - parameters.keys()), sorted(parameters.keys() - own.keys())
    if missing or foreign:
        raise ModelError("the weights are of another model", why=f"missing {missing}, unknown {foreign}")
    for name, parameter in own.items():
        array = parameters[name]
        if array.dtype != np.float32 or array.shape != tuple(parameter.shape):
            raise ModelError(
                f"weight {name} does not fit the model",
                why=f"expected float32 {tuple(parameter.shape)}, got {array.dtype} {array.shape}",
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.tensor(parameters[name]))


def read_parameters(model: nn.Module) -> dict[str, np.ndarray]:
    """Copy the weights out as float32 arrays, in the model's order."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
        for name, parameter in model.named_parameters()
    }


def _builder(name: str) -> Callable[[ModelSpec], nn.Module]:
    if name in BUILDERS:
        return BUILDERS[name]
    if name == "scattering":
        from common.models.scattering import scattering

        return scattering
    if MODELS[name].series:
        from common.models import series

        return series.BUILDERS[name]
    from common.models import residual

    return residual.BUILDERS[name]
