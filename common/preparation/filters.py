"""Denoising and local histogram equalisation of shades in [0, 1], by scipy and scikit-image."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.preparation.settings import PreprocessingSection

PATCH: Final = 5
"""Pixels along a patch of non-local means."""
DISTANCE: Final = 6
"""How far patches are looked for, in pixels."""
TWENTIETH: Final = 0.05
"""Non-local means' h for a strength of 1, on the scale from black to white."""


def denoised(shades: NDArray[np.float32], steps: PreprocessingSection) -> NDArray[np.float32]:
    """(H, W, channels), each channel by itself but for non-local means, whose patches have all of them."""
    if steps.denoise == "none":
        return shades
    if steps.denoise == "non-local-means":
        from skimage.restoration import denoise_nl_means

        coloured = shades.shape[2] > 1
        found = denoise_nl_means(
            shades if coloured else shades[..., 0],
            patch_size=PATCH,
            patch_distance=DISTANCE,
            h=TWENTIETH * steps.denoise_strength,
            fast_mode=True,
            channel_axis=-1 if coloured else None,
        )
        return _within(found, shades.shape)
    from scipy import ndimage

    planes = [shades[..., channel] for channel in range(shades.shape[2])]
    if steps.denoise == "gaussian":
        planes = [ndimage.gaussian_filter(plane, steps.denoise_strength, mode="nearest") for plane in planes]
    else:
        width = 2 * int(steps.denoise_strength) + 1
        planes = [ndimage.median_filter(plane, size=width, mode="nearest") for plane in planes]
    return np.stack(planes, axis=2).astype(np.float32)


def equalised(shades: NDArray[np.float32], steps: PreprocessingSection) -> NDArray[np.float32]:
    """(H, W, channels) by CLAHE; of colours their brightness alone. One shade stays one shade.

    Source: Zuiderveld, Contrast Limited Adaptive Histogram Equalization, Graphics Gems IV, 1994.
    """
    if not steps.clahe or shades.min() == shades.max():
        return shades
    from skimage.exposure import equalize_adapthist

    tile = tuple(max(1, -(-side // steps.clahe_tiles)) for side in shades.shape[:2])
    picture = shades if shades.shape[2] == 3 else shades[..., 0]
    found = equalize_adapthist(picture, kernel_size=tile, clip_limit=steps.clahe)
    return _within(found, shades.shape)


def _within(shades: NDArray[np.floating[Any]], shape: tuple[int, ...]) -> NDArray[np.float32]:
    kept: NDArray[np.float32] = np.clip(shades, 0, 1).astype(np.float32).reshape(shape)
    return kept
