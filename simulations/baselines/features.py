"""Simple features of a prepared picture: means of a grid, a histogram, oriented gradients. Nothing is fitted.

simple_features(images)   # uint8 (rows, 1, size, size) -> float32 (rows, 368)
"""

import numpy as np
from numpy.typing import NDArray

GRID, BINS, CELLS, ORIENTATIONS = 8, 16, 4, 8
"""Side of the grid, bins of the histogram, side of the grid of cells, directions of each."""
SMALLEST_SIDE = 8
"""Pixels; smaller pictures have no grid of 8 and no cell of 2."""
_CELLS_OF_BLOCK = 2
NUM_GRADIENTS = (CELLS - _CELLS_OF_BLOCK + 1) ** 2 * _CELLS_OF_BLOCK**2 * ORIENTATIONS
_ROWS_AT_ONCE = 256
"""Bounds memory and changes nothing else."""


def simple_features(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 (rows, num_features) of prepared pictures (rows, channels, size, size), row by row.

    Raises ValueError for other shapes or types, or a side below SMALLEST_SIDE.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or min(images.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(
            f"expected uint8 (rows, channels, {SMALLEST_SIDE} or more, likewise), "
            f"got {images.dtype} {images.shape}"
        )
    return np.concatenate(
        [
            np.hstack([grid_means(block), histogram(block), oriented_gradients(block)])
            for block in np.array_split(images, max(1, -(-len(images) // _ROWS_AT_ONCE)))
        ]
    )


def grid_means(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(rows, channels * GRID**2): mean shade of each field, 0 black to 1 white, row by row of the picture."""
    edges = [np.arange(GRID) * side // GRID for side in images.shape[2:]]
    sums = np.add.reduceat(images, edges[0], axis=2, dtype=np.float32)
    sums = np.add.reduceat(sums, edges[1], axis=3)
    high, wide = (np.diff(edge, append=side) for edge, side in zip(edges, images.shape[2:], strict=True))
    means = sums / (255 * np.outer(high, wide)).astype(np.float32)
    return np.asarray(means.reshape(len(images), images.shape[1] * GRID**2), np.float32)


def histogram(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(rows, channels * BINS): share of each channel's pixels in bins of equal width, dark to bright."""
    rows, channels, height, width = images.shape
    planes = rows * channels
    bins = (images // (256 // BINS)).reshape(planes, height * width).astype(np.int64)
    bins += BINS * np.arange(planes)[:, None]
    counts = np.bincount(bins.ravel(), minlength=planes * BINS)
    return np.asarray(counts.reshape(rows, channels * BINS) / (height * width), np.float32)


def oriented_gradients(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(rows, NUM_GRADIENTS): histograms of oriented gradients of the grey picture.

    Dalal and Triggs, CVPR 2005, as scikit-image has them: 4 by 4 cells whatever the size, contrast
    normalised in overlapping blocks of 2 by 2. A picture without an edge is all zeros.
    """
    from skimage.feature import hog

    high, wide = (side // CELLS for side in images.shape[2:])
    # What exceeds whole cells at the right and the bottom is left out, or some sizes would have a fifth cell.
    grey = images[:, :, : CELLS * high, : CELLS * wide].mean(axis=1, dtype=np.float64) / 255
    found = np.zeros((len(images), NUM_GRADIENTS), np.float32)
    for row, picture in enumerate(grey):
        found[row] = hog(
            picture,
            orientations=ORIENTATIONS,
            pixels_per_cell=(high, wide),
            cells_per_block=(_CELLS_OF_BLOCK, _CELLS_OF_BLOCK),
        )
    return found
