"""Where in a picture a model found what speaks for a class, by three methods.

gradcam: the last maps before the network reads them are multiplied, place by place, with the gradient of the
class's score and summed over channels; what is negative speaks against the class and is left out. This is
Grad-CAM without its averaging of the gradient over the picture (HiResCAM, Draelos and Carin, arXiv
2011.08891): these networks weigh each place of their grid differently, so that the average points nowhere.
Behind a mean over all places (resnet18) both are the same.

integrated-gradients: what each pixel adds on the way from black to the picture (`attributions`), smoothed.

combined: the product of both, as Guided Grad-CAM is one (Selvaraju et al., arXiv 1610.02391, section 3.2);
the maps are those of the picture and of its mirror image, so that the grid's weights even out. A ReLU map is
zero where nothing was found; a tanh map is not, so that gradcam alone also heats what every chest has, the
edges of the mediastinum. Only what both find stays hot.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from client.prediction.attributions import QUICK_STEPS, Score, class_score, integrated_gradients, smoothed
from client.prediction.heat_method import HeatMethod
from client.prediction.task_scores import STANDING_ALONE, ScoreOfEach
from common.errors import ModelError
from common.models.plain_scattering import plain_form
from common.preprocessing import Preprocessing
from common.task_kinds import CLASSIFICATION

_ROWS_AT_ONCE = 32
PICTURE_STEPS = 16
"""Of integrated gradients, where they alone make the picture."""
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
            fix="leave out --heat-map, or choose --heat-map-method integrated-gradients",
        )
    return found[-1]


def heat_maps(
    network: nn.Module,
    images: NDArray[np.uint8],
    classes: NDArray[np.int64],
    *,
    preprocessing: Preprocessing,
    method: HeatMethod = HeatMethod.COMBINED,
    task: str = CLASSIFICATION,
) -> NDArray[np.float32]:
    """(rows, h, w), each from 0 to 1 at its hottest place; all zero where nothing speaks for the class.

    `images` are uint8 (rows, channels, size, size) as the model sees them, `classes` (rows,) the class that
    is explained: its logit less the mean of the others, or, where a class stands alone, its own score
    (`client.prediction.task_scores`). Raises ModelError for a model without maps, unless `method` is
    integrated gradients.
    """
    side, found = preprocessing.image_size, []
    layer = None
    if method is not HeatMethod.INTEGRATED_GRADIENTS:
        layer = layer_of_maps(network, (preprocessing.channels, side, side))
    score = partial(class_score, against_others=task not in STANDING_ALONE)
    asked = ScoreOfEach(network, task).eval()
    differentiable = asked
    if method is not HeatMethod.GRADCAM:
        differentiable = ScoreOfEach(plain_form(network, image_size=side), task).eval()
    black = torch.from_numpy(preprocessing.standardise(np.zeros_like(images[:1])))
    for start in range(0, len(images), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        inputs = torch.from_numpy(preprocessing.standardise(images[rows]))
        chosen = torch.from_numpy(classes[rows])
        heat = None if layer is None else _of_maps(asked, layer, inputs, chosen, score)
        if method is not HeatMethod.GRADCAM:
            steps = PICTURE_STEPS if layer is None else QUICK_STEPS
            pixels = integrated_gradients(
                differentiable, inputs, chosen, baseline=black, steps=steps, score=score
            )
            pixels = _normal(smoothed(pixels.sum(dim=1)))
            if layer is not None and heat is not None:
                mirrored = _of_maps(asked, layer, inputs.flip(3), chosen, score).flip(2)
                pixels = _normal(_enlarged(heat + mirrored, side) * pixels)
            heat = pixels
        assert heat is not None
        found.append(heat.numpy())
    return np.concatenate(found) if found else np.zeros((0, 1, 1), np.float32)


def _of_maps(network: nn.Module, layer: nn.Module, inputs: Tensor, classes: Tensor, score: Score) -> Tensor:
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _layer, _inputs, output: kept.append(output))
    try:
        with torch.enable_grad():
            found = score(network(inputs.clone().requires_grad_()), classes)
            # A layer that is used twice, as the activation of a residual block, counts where it ends.
            (gradient,) = torch.autograd.grad(found.sum(), kept[-1])
    finally:
        handle.remove()
    return _normal((gradient * kept[-1]).sum(dim=1).detach())


def _normal(heat: Tensor) -> Tensor:
    """What speaks for the class, 1 at its hottest place."""
    positive = torch.nan_to_num(heat).clamp(min=0)
    return positive / positive.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def _enlarged(heat: Tensor, side: int) -> Tensor:
    return nn.functional.interpolate(heat[:, None], (side, side), mode="bilinear")[:, 0]


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
