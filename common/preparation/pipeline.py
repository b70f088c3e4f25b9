"""All configured steps in their order, from an upright picture to the model's 8-bit array."""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.intensities import Intensities, rounded
from common.preparation.filters import denoised, equalised
from common.preparation.foreground import Mask, body, box_of, foreground, lung_fields
from common.preparation.places import centred, resized, sides_within
from common.preparation.problems import CannotPrepareError, Problem
from common.preparation.settings import PreprocessingSection
from common.preparation.shades import grey, shades_of

LEAST_SHARE_OF_SIZE: Final = 0.5
"""What a crop leaves must have this share of the model's size on its shorter side: no more is invented."""


def prepared(
    picture: Image.Image | Intensities, steps: PreprocessingSection, *, channels: int, image_size: int
) -> NDArray[np.uint8]:
    """uint8 (channels, image_size, image_size). Raises CannotPrepareError."""
    # 1. Which values are black and white; grey or colour.
    shades = shades_of(picture, steps, channels=channels)
    # 2. What is masked, found before anything is cut away, and applied last.
    mask = _mask(shades, steps)
    # 3. Crop.
    shades, mask = _cropped(shades, mask, steps, image_size=image_size)
    # 4. Resize, as the aspect is to be kept or not.
    size = (image_size, image_size)
    if steps.resize == "pad":
        size = sides_within(shades.shape[0], shades.shape[1], image_size)
    planes = [resized(shades[..., channel], size) for channel in range(channels)]
    small = np.clip(np.stack(planes, axis=2), 0, 1)
    # 5. and 6. Filters, in the model's pixels: they mean the same whatever the scanner's resolution.
    small = equalised(denoised(small, steps), steps)
    if mask is not None:
        small = np.where(resized(mask.astype(np.float32), size)[..., None] >= 0.5, small, 0)
    # 7. Black around what kept its aspect; 8 bits.
    square = rounded(centred(small.astype(np.float32, copy=False), image_size))
    return np.ascontiguousarray(square.transpose(2, 0, 1))


def _mask(shades: NDArray[np.float32], steps: PreprocessingSection) -> Mask | None:
    if steps.mask == "none":
        return None
    mask = (body if steps.mask == "body" else lung_fields)(grey(shades))
    if not mask.any():
        raise CannotPrepareError(Problem.NO_FOREGROUND)
    return mask


def _cropped(
    shades: NDArray[np.float32], mask: Mask | None, steps: PreprocessingSection, *, image_size: int
) -> tuple[NDArray[np.float32], Mask | None]:
    if steps.crop == "none":
        return shades, mask
    height, width = shades.shape[:2]
    if steps.crop == "centre":
        kept = [max(1, round(side * steps.crop_share)) for side in (height, width)]
        top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
        bottom, right = top + kept[0], left + kept[1]
    else:
        box = box_of(foreground(grey(shades)) if mask is None else mask)
        if box is None:
            raise CannotPrepareError(Problem.NO_FOREGROUND)
        top, bottom, left, right = box
        beside = [round((bottom - top) * steps.crop_margin), round((right - left) * steps.crop_margin)]
        top, bottom = max(0, top - beside[0]), min(height, bottom + beside[0])
        left, right = max(0, left - beside[1]), min(width, right + beside[1])
    if min(bottom - top, right - left) < LEAST_SHARE_OF_SIZE * image_size:
        raise CannotPrepareError(Problem.TOO_SMALL)
    region = (slice(top, bottom), slice(left, right))
    return shades[region], None if mask is None else mask[region]
