"""First steps: which values are black and white, and grey or colour."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.intensities import LUMA, Intensities, Span, Window
from common.preparation.problems import CannotPrepareError, Problem
from common.preparation.settings import PreprocessingSection

_CHROMA: Final = 24
"""Of 255: a pixel is coloured where its channels differ by more."""
COLOURED_SHARE: Final = 0.05
"""So many coloured pixels make a coloured picture; a marker or a stamp is less."""
_LOOKED_AT: Final = 256


def shades_of(
    picture: Image.Image | Intensities, steps: PreprocessingSection, *, channels: int
) -> NDArray[np.float32]:
    """(H, W, channels) in [0, 1] of an upright picture. Raises CannotPrepareError."""
    shades = _ranged(picture, steps)
    shades = shades[..., None] if shades.ndim == 2 else shades
    if steps.colour == "refuse" and is_coloured(shades) != (channels == 3):
        raise CannotPrepareError(Problem.GREY if channels == 3 else Problem.COLOURED)
    if shades.shape[2] == channels:
        return shades
    return np.repeat(shades, 3, axis=2) if channels == 3 else grey(shades)[..., None]


def grey(shades: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W) of (H, W, 1 or 3), colours by ITU-R 601 luma."""
    if shades.shape[2] == 1:
        return shades[..., 0]
    red, green, blue = LUMA
    found: NDArray[np.float32] = shades[..., 0] * red + shades[..., 1] * green + shades[..., 2] * blue
    return found


def is_coloured(shades: NDArray[np.float32]) -> bool:
    """Whether (H, W, 1 or 3) shows colour at a glance; a marker in a corner of a grey film does not."""
    if shades.shape[2] == 1:
        return False
    every = -(-max(shades.shape[:2]) // _LOOKED_AT)
    return coloured_share(shades[::every, ::every], white=1) > COLOURED_SHARE


def coloured_share(shades: NDArray[Any], *, white: int) -> float:
    """Share of the pixels of (H, W, 3) that are coloured; values are 0 to `white`."""
    spread = np.subtract(shades.max(axis=2), shades.min(axis=2), dtype=np.float32)
    return float(np.mean(spread > _CHROMA * white / 255))


def _ranged(picture: Image.Image | Intensities, steps: PreprocessingSection) -> NDArray[np.float32]:
    if isinstance(picture, Intensities):
        if steps.window:
            needed = steps.window_units == "hounsfield"
            if picture.values.ndim != 2 or (needed and not picture.is_hounsfield):
                raise CannotPrepareError(Problem.NO_UNITS)
            centre, width = steps.window
            window = Window(centre=centre, width=width, function="LINEAR_EXACT")
            return _turned(window.shades(picture.values), picture)
        if steps.clip_percentiles:
            return _turned(_clipped(picture.values, steps.clip_percentiles), picture)
        return picture.shades()
    if steps.window:
        raise CannotPrepareError(Problem.NO_UNITS)
    pixels = np.asarray(picture).astype(np.float32)
    if steps.clip_percentiles:
        return _clipped(pixels, steps.clip_percentiles)
    return pixels / np.float32(255)


def _turned(shades: NDArray[np.float32], picture: Intensities) -> NDArray[np.float32]:
    return 1 - shades if picture.inverted else shades


def _clipped(values: NDArray[np.floating[Any]], percentiles: tuple[float, ...]) -> NDArray[np.float32]:
    """Straight from one percentile of the finite values to the other; black where they are one value."""
    counted = values[np.isfinite(values)]
    if not counted.size:
        return np.zeros(values.shape, np.float32)
    low, high = np.percentile(counted, percentiles)
    return Span(low=float(low), high=float(high)).shades(values)
