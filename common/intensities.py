"""Pictures deeper than 8 bits, and the rule that turns their values into shades from black to white.

The values stay as the file has them (Hounsfield units, 16-bit greys, any float) until `Preprocessing` makes
the model's 8-bit array: shades are formed and resized as float32 and rounded once, at the end.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

LOWEST_SHARE: Final = 0.001
"""Share of a picture's values that `Span.of` lets go black, and the same share white."""
RULE: Final = f"window, table or {LOWEST_SHARE:g}..{1 - LOWEST_SHARE:g} quantiles"
"""The rule in words, for model.json and the key of cached images."""
LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)
"""Shares of red, green and blue in a grey, ITU-R 601."""


class Shown(Protocol):
    """How values become shades."""

    def shades(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Values of any shape to [0, 1]; what is not finite counts as the lowest."""
        ...


@dataclass(frozen=True, kw_only=True)
class Span:
    """Straight from black at `low` to white at `high`; all black where the two are equal."""

    low: float
    high: float

    @classmethod
    def of(cls, values: NDArray[np.floating[Any]], *, without: tuple[float, float] | None = None) -> Self:
        """From the 0.1 % to the 99.9 % quantile of the finite values, both of them values of the picture.

        `without` is a range of values that are no picture, such as DICOM's padding.
        """
        counted = values[np.isfinite(values)]
        if without is not None:
            inside = counted[(counted < without[0]) | (counted > without[1])]
            counted = inside if inside.size else counted
        if not counted.size:
            return cls(low=0.0, high=0.0)
        low = np.quantile(counted, LOWEST_SHARE, method="lower")
        high = np.quantile(counted, 1 - LOWEST_SHARE, method="higher")
        return cls(low=float(low), high=float(high))

    def shades(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """As the class says, clipped."""
        width = self.high - self.low
        if not width > 0 or not np.isfinite(width):
            return np.zeros(values.shape, np.float32)
        return _clipped((values - self.low) / width)


@dataclass(frozen=True, kw_only=True)
class Window:
    """DICOM's window, PS3.3 C.11.2.1.2 and C.11.2.1.3."""

    centre: float
    width: float
    """>= 1 for LINEAR, else > 0."""
    function: Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"] = "LINEAR"

    def shades(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """As the standard says, with the darkest output as 0 and the brightest as 1."""
        if self.function == "SIGMOID":
            exponent = np.clip(-4 * (values - self.centre) / self.width, -700, 700)
            return _clipped(1 / (1 + np.exp(exponent)))
        if self.function == "LINEAR_EXACT":
            return _clipped((values - self.centre) / self.width + 0.5)
        if self.width <= 1:
            return _clipped(np.where(values > self.centre - 0.5, 1.0, 0.0))
        return _clipped((values - (self.centre - 0.5)) / (self.width - 1) + 0.5)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShadeTable:
    """One shade for each whole number from `first` on; below and above, the first and the last."""

    first: int
    outputs: NDArray[np.float32]
    """(entries,) in [0, 1]."""

    def shades(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Look values up, rounded down to whole numbers."""
        finite = np.nan_to_num(values, nan=self.first, posinf=self.first, neginf=self.first)
        places = np.clip(np.floor(finite) - self.first, 0, len(self.outputs) - 1).astype(np.int64)
        shades: NDArray[np.float32] = self.outputs[places]
        return shades


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Intensities:
    """One deep picture."""

    values: NDArray[np.floating[Any]]
    """(H, W) or (H, W, 3), in the file's own units: float32, or float64 where that would round them."""
    shown: Shown
    inverted: bool = False
    """Whether the highest value is black (MONOCHROME1)."""
    is_hounsfield: bool = False
    """Whether the file says that the values are Hounsfield units."""

    def shades(self) -> NDArray[np.float32]:
        """(H, W) or (H, W, 3) in [0, 1]: 0 black, 1 white."""
        shades = self.shown.shades(self.values)
        return 1 - shades if self.inverted else shades

    def grey_shades(self) -> NDArray[np.float32]:
        """(H, W) in [0, 1]; colour by ITU-R 601 luma."""
        shades = self.shades()
        if shades.ndim == 2:
            return shades
        red, green, blue = LUMA
        grey: NDArray[np.float32] = shades[..., 0] * red + shades[..., 1] * green + shades[..., 2] * blue
        return grey

    def eight_bits(self) -> NDArray[np.uint8]:
        """The picture as a screen shows it, uint8 of the values' shape."""
        return rounded(self.shades())


def kept_apart(values: NDArray[Any], stored: np.dtype[Any]) -> NDArray[np.floating[Any]]:
    """Floats that differ where stored values of that type did: float32 up to 16 bits, else float64."""
    small = stored.itemsize <= 2 or (stored.kind == "f" and stored.itemsize <= 4)
    return values.astype(np.float32 if small else np.float64)


def rounded(shades: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[0, 1] to 0..255."""
    eight_bits: NDArray[np.uint8] = np.rint(shades * np.float32(255)).clip(0, 255).astype(np.uint8)
    return eight_bits


def _clipped(shades: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    lowest = np.nan_to_num(shades, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    clipped: NDArray[np.float32] = np.clip(lowest, 0, 1).astype(np.float32, copy=False)
    return clipped
