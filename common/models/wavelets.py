"""The scattering transform of small square images: wavelets that nobody fitted, on torch's FFTs.

Morlet wavelets of J scales and L angles and one Gaussian window. With * for periodic convolution of the
padded image x, what comes out is the window's local mean of x, of |x * psi_a| and of ||x * psi_a| * psi_b|
for b of a coarser scale than a, every 2**J pixels. It hardly moves when the picture is shifted or bent a bit.

Sources: Bruna and Mallat, Invariant Scattering Convolution Networks, arXiv 1203.1513, sections 2 and 3. The
constants (bandwidth 0.8, centre 3 pi / 4, slant 4 / L, reflected borders) are those of Kymatio 0.3, so that
the numbers are comparable with the literature's (Andreux et al., arXiv 1812.11214).
"""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

BANDWIDTH = 0.8
"""Standard deviation in pixels of the finest wavelet and of the window at scale 0."""
CENTRE = 3 * math.pi / 4
"""Frequency of the finest wavelet in radians per pixel."""
_ALIASES = range(-2, 3)
"""Multiples of 2 pi at which a Gaussian still has weight within the band of a pixel grid."""

Grid = NDArray[np.float64]


class Scattering(nn.Module):
    """The transform for images of one side; it has constants and no parameters."""

    def __init__(self, side: int, *, scales: int, angles: int, dtype: torch.dtype = torch.float32) -> None:
        """Make the filters of (side, side) images; raises ValueError where `side` is below 2 * 2**scales."""
        super().__init__()
        step = 2**scales
        if side < 2 * step:
            raise ValueError(f"images of {side} px are too small for {scales} scales")
        self._dtype = dtype
        self.scales, self.angles = scales, angles
        self.padded = ((side + step) // step + 1) * step
        self.before = (self.padded - side) // 2
        self._after = self.padded - side - self.before
        self.grid = self.padded // step - 2
        """Places along each axis."""
        self.channels = 1 + scales * angles + angles**2 * scales * (scales - 1) // 2
        """Numbers at each place."""
        for resolution in range(scales):
            for scale in range(resolution, scales):
                if scale > resolution or resolution == 0:
                    filters = wavelets(self.padded, scale=scale, angles=angles, resolution=resolution)
                    # Every 2**k-th pixel has the mean of the aliases as its spectrum; they are added up.
                    self._keep(f"wavelets_{scale}_{resolution}", filters / 4.0 ** (scale - resolution))
            window = window_rows(self.padded, scales=scales, resolution=resolution)
            self._keep(f"window_{resolution}", window[1:-1])

    def forward(self, images: Tensor) -> Tensor:
        """Map (rows, side, side) to (rows, channels, grid, grid): order 0, 1 and 2, fine to coarse."""
        padding = [self.before, self._after] * 2
        padded = nn.functional.pad(images[:, None], padding, mode="reflect")
        spectrum = torch.fft.fft2(padded)
        first, second = [self._mean(padded, 0)], []
        for scale in range(self.scales):
            waves = self._moduli(spectrum, scale=scale, resolution=0)
            first.append(self._mean(waves, scale))
            if scale + 1 < self.scales:
                spectra = torch.fft.fft2(waves)[:, :, None]
                for coarser in range(scale + 1, self.scales):
                    beats = self._moduli(spectra, scale=coarser, resolution=scale)
                    second.append(self._mean(beats, coarser).flatten(1, 2))
        return torch.cat([*first, *second], dim=1)

    def _moduli(self, spectrum: Tensor, *, scale: int, resolution: int) -> Tensor:
        """|x * psi| of each angle, on every 2**scale-th pixel, from the spectrum on each 2**resolution-th."""
        product = spectrum * getattr(self, f"wavelets_{scale}_{resolution}")
        waves: Tensor = torch.fft.ifft2(_folded(product, self.padded >> scale))
        return waves.abs()

    def _mean(self, values: Tensor, resolution: int) -> Tensor:
        window: Tensor = getattr(self, f"window_{resolution}")
        return window @ values @ window.T

    def _keep(self, name: str, values: Grid) -> None:
        keep_constant(self, name, torch.from_numpy(values).to(self._dtype))


def keep_constant(layer: nn.Module, name: str, values: Tensor) -> None:
    """Hang numbers onto a layer that follow it to a device but are no weights; on torch's default device."""
    layer.register_buffer(name, values.to(torch.get_default_device()), persistent=False)


@lru_cache(maxsize=64)
def wavelets(side: int, *, scale: int, angles: int, resolution: int = 0) -> Grid:
    """Spectra (angles, n, n) of the Morlet wavelets of a scale, on a periodic grid.

    n is side / 2**resolution. Real, because the wavelets are symmetric up to conjugation; 0 at frequency 0.
    """
    spread, slant = BANDWIDTH * 2.0**scale, 4 / angles
    found = []
    for number in range(angles):
        angle = (angles - angles // 2 - 1 - number) * math.pi / angles
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-along[1], along[0]])
        covariance = spread**2 * (np.outer(along, along) + np.outer(across, across) / slant**2)
        wave = _gaussian(side, covariance, centre=CENTRE / 2.0**scale * along)
        hump = _gaussian(side, covariance, centre=np.zeros(2))
        found.append(_low(wave - wave[0, 0] / hump[0, 0] * hump, resolution))
    return np.stack(found)


@lru_cache(maxsize=64)
def window_rows(side: int, *, scales: int, resolution: int = 0) -> Grid:
    """Rows that average along one axis around every 2**scales-th pixel.

    Their shape is (side / 2**scales, side / 2**resolution). Along both axes they are the Gaussian window of
    0.8 * 2**(scales - 1) pixels, periodic.
    """
    spread = BANDWIDTH * 2.0 ** (scales - 1)
    frequencies = _frequencies(side)
    spectrum = sum(np.exp(-((spread * (frequencies + 2 * math.pi * k)) ** 2) / 2) for k in _ALIASES)
    kernel = np.fft.ifft(_low_axis(np.asarray(spectrum), resolution, axis=0)).real
    places = np.arange(0, len(kernel), 2 ** (scales - resolution))
    return np.asarray(kernel[(places[:, None] - np.arange(len(kernel))) % len(kernel)])


def _gaussian(side: int, covariance: Grid, *, centre: Grid) -> Grid:
    """Spectrum (side, side) of a Gaussian of that covariance in pixels, of sum 1, shifted to `centre`."""
    total = np.zeros((side, side))
    for down in _ALIASES:
        for right in _ALIASES:
            u = (_frequencies(side) + 2 * math.pi * down - centre[0])[:, None]
            v = (_frequencies(side) + 2 * math.pi * right - centre[1])[None, :]
            form = covariance[0, 0] * u * u + 2 * covariance[0, 1] * u * v + covariance[1, 1] * v * v
            total += np.exp(-form / 2)
    return total


def _frequencies(side: int) -> Grid:
    return np.asarray(2 * math.pi * np.fft.fftfreq(side))


def _low(spectrum: Grid, resolution: int) -> Grid:
    return _low_axis(_low_axis(spectrum, resolution, axis=0), resolution, axis=1)


def _low_axis(spectrum: Grid, resolution: int, *, axis: int) -> Grid:
    """The band of a grid 2**resolution times as coarse."""
    kept = spectrum.shape[axis] >> resolution
    half = kept // 2
    return np.concatenate(
        [np.take(spectrum, range(half), axis), np.take(spectrum, range(-(kept - half), 0), axis)], axis
    )


def _folded(spectrum: Tensor, side: int) -> Tensor:
    """Sum over the aliases of a coarser grid, (..., n, n) to (..., side, side); n / side a power of two."""
    while (half := spectrum.shape[-1] // 2) >= side:
        spectrum = spectrum[..., :half, :] + spectrum[..., half:, :]
        spectrum = spectrum[..., :half] + spectrum[..., half:]
    return spectrum
