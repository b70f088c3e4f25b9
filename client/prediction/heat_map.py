"""Where in a picture a convolutional model found what speaks for a class.

The last maps before the network reads them are multiplied, place by place, with the gradient of the class's
score and summed over channels; what is negative speaks against the class and is left out. This is Grad-CAM
without its averaging of the gradient over the picture (HiResCAM, Draelos and Carin, arXiv 2011.08891): these
networks weigh each place of their grid differently, so that the average points nowhere. Behind a mean over
all places (resnet18) both are the same.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from common.errors import ModelError
from common.preprocessing import Preprocessing

_ROWS_AT_ONCE = 32
_NO_MAPS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Flatten, nn.Dropout)
_STOPS = ((0.0, (255, 230, 120)), (0.5, (255, 140, 0)), (1.0, (200, 0, 30)))
_MOST_OPAQUE = 0.6


def layer_of_maps(network: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
    """The last layer that puts out maps before they are pooled or read. Raises ModelError for none."""
    found: list[nn.Module] = []

    def note(layer: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] > 1:
            found.append(layer)

    layers = [layer for layer in network.modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(note) for layer in layers if not isinstance(layer, _NO_MAPS)]
    try:
        with torch.no_grad():
            network(torch.zeros(1, *input_shape))
    finally:
        for handle in handles:
            handle.remove()
    if not found or not any(isinstance(layer, nn.Conv2d) for layer in layers):
        raise ModelError(
            "this model has no heat map",
            why="it has no convolutions whose maps could be shown",
            fix="leave out --heat-map, or train a convolutional model",
        )
    return found[-1]


def heat_maps(
    network: nn.Module,
    images: NDArray[np.uint8],
    classes: NDArray[np.int64],
    *,
    preprocessing: Preprocessing,
    against_others: bool = True,
) -> NDArray[np.float32]:
    """(rows, h, w), each from 0 to 1 at its hottest place; all zero where nothing speaks for the class.

    `images` are uint8 (rows, channels, size, size) as the model sees them, `classes` (rows,) the class that
    is explained: its logit, less the mean of the others if `against_others`. Raises ModelError for a model
    without maps.
    """
    side = preprocessing.image_size
    layer = layer_of_maps(network, (preprocessing.channels, side, side))
    maps = [
        _heat(network, layer, preprocessing.standardise(images[rows]), classes[rows], against_others)
        for rows in (slice(s, s + _ROWS_AT_ONCE) for s in range(0, len(images), _ROWS_AT_ONCE))
    ]
    return np.concatenate(maps) if maps else np.zeros((0, 1, 1), np.float32)


def _heat(
    network: nn.Module,
    layer: nn.Module,
    inputs: NDArray[np.float32],
    classes: NDArray[np.int64],
    against_others: bool,
) -> NDArray[np.float32]:
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _layer, _inputs, output: kept.append(output))
    try:
        with torch.enable_grad():
            logits = network(torch.from_numpy(inputs).requires_grad_())
            chosen = logits.gather(1, torch.from_numpy(classes)[:, None])[:, 0]
            others = logits.shape[1] - 1 if against_others else 0
            score = chosen - (logits.sum(dim=1) - chosen) / others if others else chosen
            # A layer that is used twice, as the activation of a residual block, counts where it ends.
            (gradient,) = torch.autograd.grad(score.sum(), kept[-1])
    finally:
        handle.remove()
    heat = (gradient * kept[-1]).sum(dim=1).clamp(min=0).detach()
    hottest = heat.amax(dim=(1, 2), keepdim=True)
    return np.asarray((heat / hottest.clamp(min=1e-12)).numpy())


def resized(heat: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """A map (h, w) as (height, width) of a picture of `size` (width, height)."""
    plane = Image.fromarray(np.ascontiguousarray(heat))
    return np.asarray(plane.resize(size, Image.Resampling.BILINEAR))


def overlay(picture: Image.Image, heat: NDArray[np.float32]) -> Image.Image:
    """The picture with the heat from yellow to red laid over it; where there is none it shows unchanged."""
    values = resized(heat, picture.size).clip(0, 1)
    places = [place for place, _ in _STOPS]
    shades = zip(*(colour for _, colour in _STOPS), strict=True)
    colours = np.stack([np.interp(values, places, shade) for shade in shades], axis=-1)
    opacity = _MOST_OPAQUE * values[..., None]
    mixed = (1 - opacity) * np.asarray(picture.convert("RGB"), np.float64) + opacity * colours
    return Image.fromarray(np.rint(mixed).astype(np.uint8))
