"""Scattering features written without FFTs and complex numbers, for file formats that have neither.

The Fourier transforms of these small images are products with two fixed matrices, cosines and sines; the
inverse onto a coarser grid is another such product. The numbers are those of `ScatteringFeatures` to about
float32's precision (a test compares them); in torch it is slower, so training does not use it.
"""

import math

import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.models.fixed_stage import fixed_stage, trained_stage
from common.models.scattering import CONSTANT, FAINTEST, ScatteringFeatures
from common.models.wavelets import keep_constant
from common.preprocessing import CENTRE, SPREAD

_TINY = 1e-20
"""Squared moduli below it are that, so that the root has a gradient in black; far below FAINTEST squared."""
Complex = tuple[Tensor, Tensor]
"""Real and imaginary part."""


def plain_form(model: nn.Module, *, image_size: int) -> nn.Module:
    """The same map with every layer open to gradients and to plain formats; `model` itself mostly.

    Raises ModelError for a fixed first layer that has no such form.
    """
    stage = fixed_stage(model)
    if stage is None:
        return model
    if not isinstance(stage, ScatteringFeatures):
        raise ModelError(f"the layer {type(stage).__name__} has no form without Fourier transforms")
    return nn.Sequential(PlainScatteringFeatures(stage, image_size=image_size), trained_stage(model)).eval()


class PlainScatteringFeatures(nn.Module):
    """The same map as `features`: standardised images (rows, channels, side, side) to (rows, width)."""

    resizing: Tensor
    padding: Tensor

    def __init__(self, features: ScatteringFeatures, *, image_size: int) -> None:
        super().__init__()
        transform = features.transform
        self.features = features
        self._scales = transform.scales
        side, padded = features.side, transform.padded
        self._resized = image_size != side
        if self._resized:
            keep_constant(self, "resizing", _resizing(image_size, side))
        keep_constant(self, "padding", _padding(side, before=transform.before, padded=padded))
        for resolution in range(self._scales):
            self._keep(f"forward_{resolution}", _fourier(padded >> resolution, sign=-1))
            for scale in range(resolution, self._scales):
                rows, columns = padded >> scale, padded >> resolution
                self._keep(f"inverse_{scale}_{resolution}", _fourier(columns, sign=1, rows=rows))

    def forward(self, images: Tensor) -> Tensor:
        """The features; every operation is one that plain tensor formats know."""
        features = self.features
        pictures = (images * SPREAD + CENTRE).flatten(0, 1)
        if self._resized:
            pictures = self.resizing @ pictures @ self.resizing.T
        logarithms = self._coefficients(pictures).flatten(1).clamp_min(FAINTEST).log()
        whitened = ((logarithms - features.mean) * features.scale) @ features.whitening
        whitened = whitened.reshape(images.shape[0], -1)
        scaled = whitened / whitened.norm(dim=1, keepdim=True).clamp_min(FAINTEST)
        return torch.cat([scaled, torch.full_like(scaled[:, :1], CONSTANT)], dim=1)

    def _coefficients(self, pictures: Tensor) -> Tensor:
        """As `Scattering.forward`."""
        padded = self.padding @ pictures @ self.padding.T
        spectrum = self._spectrum(padded[:, None], 0)
        first, second = [self._mean(padded[:, None], 0)], []
        for scale in range(self._scales):
            waves = self._moduli(spectrum, scale=scale, resolution=0)
            first.append(self._mean(waves, scale))
            if scale + 1 < self._scales:
                real, imaginary = self._spectrum(waves, scale)
                spectra = (real[:, :, None], imaginary[:, :, None])
                for coarser in range(scale + 1, self._scales):
                    beats = self._moduli(spectra, scale=coarser, resolution=scale)
                    second.append(self._mean(beats, coarser).flatten(1, 2))
        return torch.cat([*first, *second], dim=1)

    def _moduli(self, spectrum: Complex, *, scale: int, resolution: int) -> Tensor:
        wavelets = getattr(self.features.transform, f"wavelets_{scale}_{resolution}")
        product = (spectrum[0] * wavelets, spectrum[1] * wavelets)
        real, imaginary = _both_sides(self._kept(f"inverse_{scale}_{resolution}"), product)
        return (real * real + imaginary * imaginary).clamp_min(_TINY).sqrt()

    def _spectrum(self, values: Tensor, resolution: int) -> Complex:
        cosines, sines = self._kept(f"forward_{resolution}")
        left = (cosines @ values, sines @ values)
        return (
            left[0] @ cosines.T - left[1] @ sines.T,
            left[0] @ sines.T + left[1] @ cosines.T,
        )

    def _mean(self, values: Tensor, resolution: int) -> Tensor:
        window: Tensor = getattr(self.features.transform, f"window_{resolution}")
        return window @ values @ window.T

    def _keep(self, name: str, matrix: Complex) -> None:
        keep_constant(self, f"{name}_real", matrix[0])
        keep_constant(self, f"{name}_imaginary", matrix[1])

    def _kept(self, name: str) -> Complex:
        return getattr(self, f"{name}_real"), getattr(self, f"{name}_imaginary")


def _both_sides(matrix: Complex, values: Complex) -> Complex:
    """M X M' of complex M (m, n) and X (..., n, n); M' is not conjugated."""
    a, b = matrix
    real, imaginary = a @ values[0] - b @ values[1], a @ values[1] + b @ values[0]
    return real @ a.T - imaginary @ b.T, real @ b.T + imaginary @ a.T


def _fourier(size: int, *, sign: int, rows: int | None = None) -> Complex:
    """exp(sign 2 pi i r c / size) as (rows, size) cosines and sines.

    With `rows` it is the inverse transform of a spectrum whose aliases are added up: onto a grid of that many
    places, every size / rows-th of the fine one, divided by `rows` as an inverse of that size is.
    """
    step = 1 if rows is None else size // rows
    places = torch.arange(size if rows is None else rows, dtype=torch.float64) * step
    angles = 2 * math.pi / size * torch.remainder(places[:, None] * torch.arange(size), size)
    share = 1.0 if rows is None else 1.0 / rows
    return (share * torch.cos(angles)).float(), (sign * share * torch.sin(angles)).float()


def _resizing(size: int, side: int) -> Tensor:
    """(side, size) matrix that averages along one axis as torch's antialiased bilinear resizing does."""
    unit = torch.eye(size)[None, None]
    return nn.functional.interpolate(unit, (side, size), mode="bilinear", antialias=True)[0, 0]


def _padding(side: int, *, before: int, padded: int) -> Tensor:
    """(padded, side) matrix that reflects a picture at its borders."""
    places = (torch.arange(padded) - before).abs()
    return torch.eye(side)[torch.where(places < side, places, 2 * (side - 1) - places)]
