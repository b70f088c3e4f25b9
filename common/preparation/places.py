"""Where pixels go: resizing, the sides of a picture that keeps its aspect, and its place in the square."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def resized(plane: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """(height, width) of (H, W), bilinear, averaging where it shrinks; the same array if nothing changes."""
    if plane.shape == size:
        return plane
    image = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))


def sides_within(height: int, width: int, side: int) -> tuple[int, int]:
    """The largest sides of the same aspect in a square, at least one pixel each."""
    longer = max(height, width)
    return max(1, round(side * height / longer)), max(1, round(side * width / longer))


def centred(planes: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """(side, side, channels): the picture in the middle of black, rather up and left."""
    height, width = planes.shape[:2]
    top, left = (side - height) // 2, (side - width) // 2
    square = np.zeros((side, side, planes.shape[2]), np.float32)
    square[top : top + height, left : left + width] = planes
    return square
