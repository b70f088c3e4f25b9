"""Copies of a step's images, each changed at random, whose gradients a unit averages before it is clipped.

Guarantee: the same as without copies. All copies of a unit's images are rows of that unit, so its averaged
gradient is clipped as one and moves the sum by at most C; the copies cost no noise and no budget. What is
drawn for one unit is independent of all others and of every image.

Source: De et al., Unlocking High-Accuracy Differentially Private Image Classification through Scale, arXiv
2204.13650, section 3 (augmentation multiplicity).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.privacy.randomness import Floats, Integers, Stream

MOST_SHIFT = 0.1
"""Images move by at most this share of their side in each direction."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Copies:
    """What goes through the network in a step: rows of the table, each as often as it has copies."""

    rows: Integers
    """(copies,) numbers of rows in the table."""
    segments: Integers
    """(copies,) unit of each, never decreasing."""
    draws: Floats | None
    """(copies, 3) uniform numbers that decide how each is changed; None leaves them as they are."""

    @property
    def numbers(self) -> Integers:
        """(copies,) 0, 1, ...: which copies there are."""
        return np.arange(len(self.rows), dtype=np.int64)

    def change_of(self, numbers: Integers) -> Callable[[NDArray[Any]], NDArray[Any]] | None:
        """What is done to the images of these copies, one after the other; None for nothing."""
        return None if self.draws is None else partial(augmented, draws=self.draws[numbers])


def copies_of(rows: Integers, segments: Integers, *, each: int, stream: Stream) -> Copies:
    """`each` copies of every row, one after the other; the rows themselves for 0."""
    if each == 0:
        return Copies(rows=rows, segments=segments, draws=None)
    draws = stream.uniform((len(rows) * each, 3))
    return Copies(rows=np.repeat(rows, each), segments=np.repeat(segments, each), draws=draws)


def augmented(images: NDArray[Any], *, draws: Floats) -> NDArray[Any]:
    """Images (rows, channels, height, width), half of them mirrored left to right, all shifted.

    draws: uniform numbers (rows, 3). By whole pixels, at most MOST_SHIFT of a side; what comes in is what
    stood at the edge. Each row is treated alone.
    """
    height, width = images.shape[2:]
    down, right = (_shifts(draws[:, axis], side) for axis, side in ((0, height), (1, width)))
    vertical = (np.arange(height) - down[:, None]).clip(0, height - 1)
    horizontal = (np.arange(width) - right[:, None]).clip(0, width - 1)
    mirrored = draws[:, 2, None] < 0.5
    horizontal = np.where(mirrored, width - 1 - horizontal, horizontal)
    numbers = np.arange(len(images))[:, None, None, None]
    channels = np.arange(images.shape[1])[None, :, None, None]
    changed: NDArray[Any] = images[numbers, channels, vertical[:, None, :, None], horizontal[:, None, None, :]]
    return changed


def _shifts(draws: Floats, side: int) -> Integers:
    most = round(MOST_SHIFT * side)
    return np.floor(draws * (2 * most + 1)).astype(np.int64) - most
