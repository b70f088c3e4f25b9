"""The model `scattering`: wavelet features that no patient's image went into, and one linear layer.

features  pixels of at most 32 x 32 -> scattering transform -> logarithm -> whitened with the statistics of
          generated noise images -> each record scaled to norm 1 -> a constant appended, in place of a bias
output    linear, from zero

Under differential privacy it has three advantages over a network: few weights, so that little noise is added
up; gradients whose norms are alike, so that clipping hardly bends them; a convex loss. Whitening matters:
without it the noise drowns all but the few strongest features. Source of the idea: Tramer and Boneh,
Differentially Private Learning Needs Better Features (or Much More Data), arXiv 2011.11660.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.config import ModelSpec
from common.models.fixed_stage import FixedStage
from common.models.generated_images import generated_images
from common.models.wavelets import Scattering, keep_constant
from common.preprocessing import CENTRE, SPREAD

SCALES, ANGLES = 3, 8
LARGEST_SIDE = 32
"""Larger images are averaged down to so many pixels: beyond, the statistics would take long to form."""
TURNED = 4
"""Each generated image counts in all quarter turns: whitening then prefers no direction."""
GENERATED = 250
"""Different generated images."""
CONSTANT = 0.3
"""Appended to every record: what a bias would do, on the scale of the features."""
FAINTEST = 1e-4
"""Below it a coefficient says nothing (8-bit pixels have steps of 4e-3)."""
_RIDGE = 0.25
"""Directions in which generated images vary less than this share of the usual are damped, not blown up."""
_AT_ONCE = 16
"""Images transformed at once: what they need fits into a core's cache."""


def scattering(spec: ModelSpec) -> nn.Module:
    """Fixed features and a linear layer without bias, zero at first; `spec.activation` has no place in it."""
    features = ScatteringFeatures(channels=spec.channels, image_size=spec.image_size)
    output = nn.Linear(features.width, spec.num_outputs, bias=False)
    nn.init.zeros_(output.weight)
    return nn.Sequential(OrderedDict(features=features, output=output))


class ScatteringFeatures(FixedStage):
    """Standardised images (rows, channels, image_size, image_size) to (rows, channels * 1000 + 1).

    Every record has the norm sqrt(1 + CONSTANT**2). Colours are looked at one by one.
    """

    mean: Tensor
    scale: Tensor
    whitening: Tensor

    def __init__(self, *, channels: int, image_size: int) -> None:
        super().__init__()
        self.width = channels * GENERATED * TURNED + 1
        self.side = min(image_size, LARGEST_SIDE)
        self._resized = image_size != self.side
        self.transform = Scattering(self.side, scales=SCALES, angles=ANGLES)
        if torch.get_default_device().type == "meta":
            numbers = self.transform.channels * self.transform.grid**2
            shapes = ((numbers,), (numbers,), (numbers, GENERATED * TURNED))
            mean, scale, whitening = (torch.empty(shape) for shape in shapes)
        else:
            statistics = statistics_of_noise(self.side)
            mean, scale, whitening = statistics.mean, statistics.scale, statistics.whitening
        keep_constant(self, "mean", mean)
        keep_constant(self, "scale", scale)
        keep_constant(self, "whitening", whitening)

    def extra_repr(self) -> str:
        """Part of the architecture's printed form."""
        return f"side={self.side}, resized={self._resized}, width={self.width}"

    def forward(self, images: Tensor) -> Tensor:
        """The features; no gradient goes through them."""
        with torch.no_grad():
            pixels = images * SPREAD + CENTRE
            if self._resized:
                size = (self.side, self.side)
                pixels = nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
            whitened = self._whitened(pixels.flatten(0, 1)).reshape(len(images), -1)
            scaled = whitened / whitened.norm(dim=1, keepdim=True).clamp_min(FAINTEST)
            return torch.cat([scaled, scaled.new_full((len(scaled), 1), CONSTANT)], dim=1)

    def _whitened(self, pictures: Tensor) -> Tensor:
        logarithms = logarithms_of(self.transform, pictures)
        return ((logarithms - self.mean) * self.scale) @ self.whitening


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What the logarithms of generated images are like."""

    mean: Tensor
    """(numbers,)"""
    scale: Tensor
    """(numbers,) one over the standard deviation."""
    whitening: Tensor
    """(numbers, generated images): after it all directions in which generated images vary are alike."""


@lru_cache(maxsize=4)
def statistics_of_noise(side: int) -> Statistics:
    """The statistics for images of `side` px, float32: the same on every machine to about that precision.

    With Z the standardised logarithms of n generated images (rows), K = Z Z' and r = _RIDGE**2 trace(K) / n,
    the whitening is Z' (K + r I)^-1: principal components, each over its singular value (damped), turned into
    the coordinates of the generated images. Eigenvectors as coordinates would be other ones on other machines
    wherever two eigenvalues are close; this form is a smooth function of Z.
    """
    with torch.device("cpu"), torch.no_grad():
        transform = Scattering(side, scales=SCALES, angles=ANGLES, dtype=torch.float64)
        pictures = torch.from_numpy(generated_images(GENERATED, side))
        shape = (-1, transform.channels, transform.grid, transform.grid)
        logarithms = logarithms_of(transform, pictures).reshape(shape)
        turned = torch.cat([_turned(logarithms, turns).flatten(1) for turns in range(TURNED)]).numpy()
    mean, stddev = turned.mean(axis=0), turned.std(axis=0)
    standard = (turned - mean) / stddev
    products = standard @ standard.T
    products[np.diag_indices_from(products)] += _RIDGE**2 * np.trace(products) / len(products)
    whitening = np.linalg.solve(products, standard).T
    return Statistics(mean=_float32(mean), scale=_float32(1 / stddev), whitening=_float32(whitening))


def logarithms_of(transform: Scattering, pictures: Tensor) -> Tensor:
    """Logarithms of all coefficients of pictures (rows, side, side), (rows, numbers)."""
    coefficients = torch.cat([transform(few) for few in torch.split(pictures, _AT_ONCE)])
    return coefficients.flatten(1).clamp_min_(FAINTEST).log_()


def _float32(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _turned(coefficients: Tensor, turns: int) -> Tensor:
    """What a picture turned by `turns` quarters would have: other places, and other angles.

    Up to the position of the grid, which is not quite in the middle; in noise all places are alike.
    """
    low, high = 1, 1 + SCALES * ANGLES
    step, rows, places = turns * ANGLES // 2, len(coefficients), coefficients.shape[2:]
    first = coefficients[:, low:high].reshape(rows, -1, ANGLES, *places).roll(step, 2).flatten(1, 2)
    second = coefficients[:, high:].reshape(rows, -1, ANGLES, ANGLES, *places)
    second = second.roll((step, step), (2, 3)).flatten(1, 3)
    return torch.cat([coefficients[:, :low], first, second], dim=1).rot90(turns, (2, 3))
