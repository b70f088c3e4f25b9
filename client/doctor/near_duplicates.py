"""Pictures that are the same to the eye though not to the byte: coded again, resized, made brighter.

Two pictures are compared by the correlation of their detail: brought to 16 x 16 pixels, less their own blur,
scaled to length 1. Films of two chests differ in their detail however alike they look from afar, which is
where the usual hashes (dHash, pHash) fail: docs/data-doctor.md has both, measured.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SIDE: Final = 16
ALIKE: Final = 0.94
"""Correlation from which two pictures count as one."""
_BLUR: Final = 1.0
"""Standard deviation of the blur, in pixels of the small picture."""
_LEAST_DETAIL: Final = 1.0
"""Shades (root mean square): a blank picture has no detail to be compared by."""
_BLOCK: Final = 1024
_VALUES_AT_ONCE: Final = 2**21


def near_duplicates(pixels: NDArray[np.uint8], rows: NDArray[np.int64]) -> list[list[int]]:
    """Groups of `rows` that are alike, each of two or more, in order.

    `pixels` is (images, channels, size, size); `rows` are those to compare, such as one of each set of exact
    repetitions. Each picture is tied to the earlier one that is most like it, so a group is a chain. Time
    grows with the square of the rows (as matrix products), memory with the rows: 1 KiB each.
    """
    details, has_detail = _details(pixels, rows)
    kept = rows[has_detail]
    tied = _most_alike(details[has_detail])
    groups: dict[int, list[int]] = {}
    leader = np.arange(len(kept))
    for place in np.flatnonzero(tied >= 0):  # an earlier row has its leader already
        leader[place] = leader[tied[place]]
        groups.setdefault(int(leader[place]), [int(kept[leader[place]])]).append(int(kept[place]))
    return list(groups.values())


def _details(
    pixels: NDArray[np.uint8], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(rows, SIDE * SIDE) of length 1, and (rows,) which of them have any detail."""
    smaller = _averaging(pixels.shape[-1])
    blur = _blurring()
    details = np.empty((len(rows), SIDE * SIDE), np.float32)
    has_detail = np.empty(len(rows), np.bool_)
    at_once = max(1, _VALUES_AT_ONCE // int(np.prod(pixels.shape[1:])))
    for start in range(0, len(rows), at_once):
        chosen = rows[start : start + at_once]
        grey = pixels[chosen].astype(np.float32).mean(axis=1)
        small = smaller @ grey @ smaller.T
        fine = (small - blur @ small @ blur.T).reshape(len(chosen), -1)
        fine -= fine.mean(axis=1, keepdims=True)
        length = np.linalg.norm(fine, axis=1)
        has_detail[start : start + len(chosen)] = length >= _LEAST_DETAIL * SIDE
        details[start : start + len(chosen)] = fine / np.maximum(length, 1e-6)[:, None]
    return details, has_detail


def _most_alike(details: NDArray[np.float32]) -> NDArray[np.int64]:
    """(rows,) the earlier row most like each, -1 where none reaches ALIKE."""
    best = np.full(len(details), np.float32(ALIKE))
    found = np.full(len(details), -1, np.int64)
    for start in range(0, len(details), _BLOCK):
        block = slice(start, start + _BLOCK)
        for other in range(0, start + 1, _BLOCK):
            alike = details[block] @ details[other : other + _BLOCK].T
            if other == start:
                alike = np.tril(alike, -1)  # earlier rows only
            nearest = alike.argmax(axis=1)
            value = alike[np.arange(len(alike)), nearest]
            better = value > best[block]
            best[block] = np.where(better, value, best[block])
            found[block] = np.where(better, nearest + other, found[block])
    return found


def _averaging(size: int) -> NDArray[np.float32]:
    """(SIDE, size): each small pixel is the mean of what it covers."""
    edges = np.linspace(0, size, SIDE + 1)
    covered = np.minimum(edges[1:, None], np.arange(1, size + 1)) - np.maximum(
        edges[:-1, None], np.arange(size)
    )
    weights = np.maximum(covered, 0)
    return _normalised(weights)


def _blurring() -> NDArray[np.float32]:
    """(SIDE, SIDE): a Gaussian along one direction."""
    apart = np.subtract.outer(np.arange(SIDE), np.arange(SIDE))
    return _normalised(np.exp(-0.5 * (apart / _BLUR) ** 2))


def _normalised(weights: NDArray[Any]) -> NDArray[np.float32]:
    shares: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares
