"""What a picture is of: the part that is not background, the body, the lung fields of a chest film.

Classical methods on the one picture, reduced to a small grid: thresholds, connected regions, morphology.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.preparation.places import resized

GRID: Final = 256
"""Longer side of what is looked at, in pixels."""
DARK: Final = 0.5
"""Background is darker than this share of Otsu's threshold, and reaches the picture's edge."""
LEAST_SHARE: Final = 0.01
"""Smaller bright regions are markers and letters, not the subject."""
_LUNGS: Final = (0.03, 0.35)
"""Least and largest share of the body that one lung field has."""
_ALIKE: Final = 0.4
"""The smaller field has at least this share of the larger one's area."""
_DARKEST: Final = (0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15)
"""Shares of the body's pixels that thresholds call dark."""
_GROWN: Final = 0.02
"""Share of the grid by which a lung field is widened: its edge belongs to it."""
Mask = NDArray[np.bool_]


def foreground(grey: NDArray[np.float32]) -> Mask:
    """(H, W) of (H, W) shades: all but the background; nothing at all where everything is one shade."""
    small, mask = _small_foreground(grey)
    return _enlarged(mask, grey.shape)


def body(grey: NDArray[np.float32]) -> Mask:
    """(H, W): the largest region that is not background, without holes and letters beside it."""
    return _enlarged(_body(_small_foreground(grey)[1]), grey.shape)


def lung_fields(grey: NDArray[np.float32]) -> Mask:
    """(H, W): both lung fields of a frontal chest film, where air is dark; else the body.

    Dark regions inside the body, one to each side of the middle, of plausible and like size, the largest such
    pair over several thresholds with and without evened background, each filled up to its convex hull. Where
    there are no two, as in many films of a white lung, the whole body is kept: leaving such films out would
    leave out the sick.
    """
    from scipy import ndimage
    from skimage.morphology import convex_hull_image

    small, mask = _small_foreground(grey)
    inside = _body(mask)
    fields = _two_fields(small, inside) if inside.any() else []
    if not fields:
        return _enlarged(inside, grey.shape)
    joined = np.zeros_like(inside)
    for field in fields:
        joined |= convex_hull_image(field)
    grown = ndimage.binary_dilation(joined, iterations=max(1, round(_GROWN * max(small.shape))))
    return _enlarged(grown & inside, grey.shape)


def _two_fields(small: NDArray[np.float32], inside: Mask) -> list[Mask]:
    """The largest pair that any threshold gives; empty where none does."""
    from scipy import ndimage

    fine = ndimage.gaussian_filter(small, GRID / 128, mode="nearest")
    evened = fine - ndimage.gaussian_filter(small, GRID / 4, mode="nearest")
    columns = np.arange(small.shape[1]) + 0.5
    middle, total = float(columns[inside.any(axis=0)].mean()), int(inside.sum())
    best: list[Mask] = []
    most = 0
    for picture in (fine, evened):
        for threshold in np.quantile(picture[inside], _DARKEST):
            dark = ndimage.binary_opening((picture < threshold) & inside, iterations=2)
            regions, _ = ndimage.label(_without_edge(dark))
            areas = np.bincount(regions.ravel())
            sides: dict[bool, tuple[int, int]] = {}
            for region in np.flatnonzero(areas >= _LUNGS[0] * total).tolist():
                if region == 0 or areas[region] > _LUNGS[1] * total:
                    continue
                own = (regions == region).sum(axis=0)
                on_right = float((own * columns).sum() / areas[region]) > middle
                sides[on_right] = max(sides.get(on_right, (0, 0)), (int(areas[region]), region))
            pair = sorted(sides.values())
            area = sum(size for size, _ in pair)
            if len(pair) == 2 and pair[0][0] >= _ALIKE * pair[1][0] and area > most:
                best, most = [regions == region for _, region in pair], area
    return best


def box_of(mask: Mask) -> tuple[int, int, int, int] | None:
    """(top, bottom, left, right) around what is true, ends excluded; None where nothing is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _small_foreground(grey: NDArray[np.float32]) -> tuple[NDArray[np.float32], Mask]:
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    height, width = grey.shape
    scale = min(1.0, GRID / max(height, width))
    small = resized(grey, (max(1, round(height * scale)), max(1, round(width * scale))))
    if small.min() == small.max():
        return small, np.zeros(small.shape, np.bool_)
    dark = small <= DARK * threshold_otsu(small)
    regions, _ = ndimage.label(dark)
    edge = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    kept = ~np.isin(regions, edge[edge > 0])
    pieces, count = ndimage.label(kept)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    large = np.flatnonzero(sizes >= LEAST_SHARE * small.size)
    wanted = large[large > 0]
    if not len(wanted) and count:
        wanted = np.array([1 + int(sizes[1:].argmax())])
    mask: Mask = np.isin(pieces, wanted)
    return small, mask


def _body(mask: Mask) -> Mask:
    from scipy import ndimage

    pieces, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(pieces.ravel())
    filled: Mask = ndimage.binary_fill_holes(pieces == 1 + int(sizes[1:].argmax()))
    return filled


def _without_edge(mask: Mask) -> Mask:
    """Regions that do not reach the left, right or upper edge: air beside the body is no lung."""
    from scipy import ndimage

    regions, _ = ndimage.label(mask)
    edge = np.concatenate([regions[0], regions[:, 0], regions[:, -1]])
    kept: Mask = mask & ~np.isin(regions, edge[edge > 0])
    return kept


def _enlarged(mask: Mask, shape: tuple[Any, ...]) -> Mask:
    """To full size, each pixel as the one of the grid that it lies in."""
    rows = np.arange(shape[0]) * mask.shape[0] // shape[0]
    columns = np.arange(shape[1]) * mask.shape[1] // shape[1]
    full: Mask = mask[rows[:, None], columns[None, :]]
    return full
