"""What a hospital's machine makes of a chest's densities: a generated film (`client.images.phantoms`)."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """What one hospital's machine does to every film."""

    contrast: float
    """Factor on the densities around mid-grey."""
    brightness: float
    """Added to every density; the film's full range is 1."""
    gamma: float
    """Exponent of the film's characteristic curve."""
    noise: float
    """Standard deviation of the noise of a mid-grey pixel; the film's full range is 1."""
    blur: float
    """Standard deviation of the point spread in coordinate units (a film is 2 wide)."""
    vignetting: float
    """Share of brightness lost in the corners."""

    @classmethod
    def of_hospital(cls, hospital: int) -> Self:
        """The scanner of a hospital: always the same one, and far from those of its neighbours in number.

        Each setting steps through its range by the square root of a prime (a Kronecker sequence), which
        spreads any run of hospitals evenly where random draws would leave twins.
        """
        shares = [(0.5 + hospital * prime**0.5) % 1 for prime in (2, 3, 5, 7, 11, 13)]
        ranges = ((0.85, 1.2), (-0.06, 0.06), (0.8, 1.3), (0.015, 0.05), (0.012, 0.045), (0.0, 0.3))
        values = [low + share * (high - low) for share, (low, high) in zip(shares, ranges, strict=True)]
        names = ("contrast", "brightness", "gamma", "noise", "blur", "vignetting")
        return cls(**dict(zip(names, values, strict=True)))


def pixel_centres(size: int) -> _Floats:
    """Coordinates of the pixels of one row, (size,)."""
    return ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)


def scan(densities: _Floats, scanner: Scanner, rng: np.random.Generator) -> NDArray[np.uint8]:
    """What the scanner makes of the densities (images, size, size): grey values 0 to 255."""
    size = densities.shape[-1]
    centres = pixel_centres(size)
    steps = (centres[:, None] - centres) / np.float32(scanner.blur)
    spread = np.exp(-(steps**2) / 2)
    spread /= spread.sum(axis=0)
    film = spread.T @ densities @ spread  # a Gaussian is separable: two small matrix products
    film = np.clip(0.5 + scanner.contrast * (film - 0.5) + scanner.brightness, 0, 1).astype(np.float32)
    np.power(film, np.float32(scanner.gamma), out=film)
    film *= 1 - np.float32(scanner.vignetting / 2) * (centres[:, None] ** 2 + centres**2)
    # Dense tissue lets few photons through, so bright pixels are the noisy ones.
    noise = rng.standard_normal(film.shape, dtype=np.float32)
    film += noise * (np.float32(scanner.noise) * (0.5 + film))
    film *= 255
    grey: NDArray[np.uint8] = np.clip(np.rint(film), 0, 255).astype(np.uint8)
    return grey
