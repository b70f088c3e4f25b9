"""Random changes of training images, a chunk at once, each row by random numbers of its own.

Guarantee: what comes out for a row is a function of that row and of its own stream, bit for bit, whatever
other rows are there, wherever it stands and however many fill the chunk up. With streams that are independent
of all data, an augmented record is a record like any other to what clips it: as in DP-SGD on a fixed record,
one patient more or less changes the clipped sum by at most C for each outcome of the streams, hence for
their mixture (De et al., Unlocking High-Accuracy Differentially Private Image Classification through Scale,
arXiv 2204.13650, section 3.2).

So nothing here is a product of matrices or a sum over rows or pixels, whose order a library may choose:
places are formed number by number, and `grid_sample` interpolates each output pixel from four input pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from common.augmentation import AugmentationSection
from common.preprocessing import Preprocessing
from common.privacy.randomness import RandomnessSource, Stream

MOST_VIEWS = 64
"""Different augmentations of one row in one step."""
Augment = Callable[[Tensor, NDArray[np.int64], NDArray[np.int64]], Tensor]
"""Changes the first rows of a chunk, which have these numbers in the table and are these views of them; the
others fill the chunk up."""
_UNIFORM = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Limits:
    """What black and white are after `Preprocessing.standardise`; scalars or (channels, 1, 1)."""

    black: Tensor
    white: Tensor

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> "Limits":
        """Of images that this preprocessing made."""
        extremes = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
        pair = preprocessing.standardise(np.repeat(extremes, preprocessing.channels, axis=1))
        black, white = torch.from_numpy(np.ascontiguousarray(pair))
        return cls(black=black, white=white)


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """What happens to each row; float32 (rows,) where nothing else is said."""

    moves: bool
    """Whether rows are sampled at other places at all: follows from the settings, never from the draws."""
    shades: bool
    """The same for brightness, contrast and noise."""
    mirrored: Tensor
    """bool (rows,): left and right change places."""
    overturned: Tensor
    """bool (rows,): top and bottom change places."""
    cosine: Tensor
    sine: Tensor
    """Of the angle; positive turns the picture clockwise."""
    factor: Tensor
    """Above 1 enlarges."""
    right: Tensor
    down: Tensor
    """Shares of width and height."""
    brightness: Tensor
    """Share of the range that is added."""
    contrast: Tensor
    """Factor."""
    bend: Tensor | None = None
    """(rows, 2, points, points) displacements to the right and down at the control points, shares."""
    noise: Tensor | None = None
    """(rows, ...) of the inputs' shape, a share of the range."""


def row_streams(
    randomness: RandomnessSource,
    rows: NDArray[np.int64],
    *,
    round_number: int,
    step: int,
    views: NDArray[np.int64] | None = None,
) -> list[Stream]:
    """A stream for each row of the table in one step; `views` tell several augmentations of a row apart."""
    views = np.zeros(len(rows), dtype=np.int64) if views is None else views
    if len(views) and not 0 <= views.min() <= views.max() < MOST_VIEWS:
        raise ValueError(f"views must be in 0..{MOST_VIEWS - 1}, got up to {views.max()}")
    return [
        randomness.stream(
            purpose="augmentation", round_number=round_number, step=step, part=MOST_VIEWS * row + view
        )
        for row, view in zip(rows.tolist(), views.tolist(), strict=True)
    ]


def augment_of_step(
    settings: AugmentationSection,
    preprocessing: Preprocessing,
    randomness: RandomnessSource,
    *,
    round_number: int,
    step: int,
) -> Augment | None:
    """What a step does to the rows it loads; None where nothing is asked for."""
    if not settings.is_on:
        return None
    limits = Limits.of(preprocessing)

    def augment(inputs: Tensor, rows: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        streams = row_streams(randomness, rows, round_number=round_number, step=step, views=views)
        return augmented(inputs, settings, streams, limits=limits)

    return augment


@torch.no_grad()
def augmented(
    inputs: Tensor, settings: AugmentationSection, streams: Sequence[Stream], *, limits: Limits
) -> Tensor:
    """Inputs whose row i is changed by stream i; rows without a stream stay as they are.

    inputs: standardised float32 (rows, channels, H, W), or (rows, times, channels, H, W), where all times of
    a row are changed alike but for the noise. Returns the same shape; the very tensor where nothing is asked
    for. Raises ValueError for more streams than rows and for what is no image.
    """
    if not settings.is_on or not streams:
        return inputs
    if inputs.ndim not in (4, 5) or len(streams) > len(inputs):
        raise ValueError(f"cannot augment {tuple(inputs.shape)} by {len(streams)} streams")
    draws = drawn(settings, streams, shape=tuple(inputs.shape))
    changed = applied(inputs, draws, limits=limits)
    changed[len(streams) :] = inputs[len(streams) :]
    return changed


def drawn(settings: AugmentationSection, streams: Sequence[Stream], *, shape: tuple[int, ...]) -> Draws:
    """Draws for inputs of that shape from the first rows' streams; the other rows are left alone.

    A stream gives the same number of values whatever is asked for, then those of bending and of noise.
    """
    values = np.full((shape[0], _UNIFORM), 0.5)
    points, rest = settings.elastic_points, shape[1:]
    bend = np.zeros((shape[0], 2, points, points)) if settings.elastic else None
    noise = np.zeros((shape[0], math.prod(rest))) if settings.noise else None
    for row, stream in enumerate(streams):
        values[row] = stream.uniform(_UNIFORM)
        if bend is not None:
            bend[row] = settings.elastic * stream.normal((2, points, points))
        if noise is not None:
            noise[row] = settings.noise * stream.normal(noise.shape[1])
    either = 2 * values - 1
    angles = [math.radians(settings.rotate * share) for share in either[:, 2].tolist()]
    return Draws(
        moves=settings.moves,
        shades=settings.shades,
        mirrored=torch.from_numpy((settings.flip in ("horizontal", "both")) & (values[:, 0] < 0.5)),
        overturned=torch.from_numpy((settings.flip in ("vertical", "both")) & (values[:, 1] < 0.5)),
        # One angle at a time: what a vector's library rounds may depend on the place in the vector.
        cosine=_float32([math.cos(angle) for angle in angles]),
        sine=_float32([math.sin(angle) for angle in angles]),
        factor=_float32(1 + settings.scale * either[:, 3]),
        right=_float32(settings.shift * either[:, 4]),
        down=_float32(settings.shift * either[:, 5]),
        brightness=_float32(settings.brightness * either[:, 6]),
        contrast=_float32(1 + settings.contrast * either[:, 7]),
        bend=None if bend is None else _float32(bend),
        noise=None if noise is None else _float32(noise.reshape(shape)),
    )


@torch.no_grad()
def applied(inputs: Tensor, draws: Draws, *, limits: Limits) -> Tensor:
    """A new tensor: mirrored, then moved, then shades changed, noise added, cut off at black and white."""
    device = inputs.device
    on = (slice(None),) + (None,) * (inputs.ndim - 1)
    result = torch.where(draws.mirrored.to(device)[on], inputs.flip(-1), inputs)
    result = torch.where(draws.overturned.to(device)[on], result.flip(-2), result)
    if draws.moves:
        height, width = inputs.shape[-2:]
        grid = _places(draws, height, width).to(device)
        flat = result.reshape(len(inputs), -1, height, width)
        moved = grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)
        result = moved.reshape(inputs.shape)
    black, white = limits.black.to(device), limits.white.to(device)
    if draws.shades:
        middle, range_ = (black + white) / 2, white - black
        result = (result - middle) * draws.contrast.to(device)[on] + middle
        result = result + draws.brightness.to(device)[on] * range_
        if draws.noise is not None:
            result = result + draws.noise.to(device) * range_
        result = torch.minimum(torch.maximum(result, black), white)
    return result


def _places(draws: Draws, height: int, width: int) -> Tensor:
    """Where each pixel comes from, (rows, height, width, 2), in `grid_sample`'s coordinates."""
    on = (slice(None), None, None)
    across = torch.arange(width, dtype=torch.float32)[None, None, :] - (width - 1) / 2
    along = torch.arange(height, dtype=torch.float32)[None, :, None] - (height - 1) / 2
    x, y = across - (draws.right * width)[on], along - (draws.down * height)[on]
    if draws.bend is not None:
        x = x - _spread(draws.bend[:, 0], height, width) * width
        y = y - _spread(draws.bend[:, 1], height, width) * height
    cosine, sine, factor = draws.cosine[on], draws.sine[on], draws.factor[on]
    from_x, from_y = (cosine * x + sine * y) / factor, (cosine * y - sine * x) / factor
    return torch.stack([2 * from_x / width, 2 * from_y / height], dim=-1)


def _spread(bend: Tensor, height: int, width: int) -> Tensor:
    """A smooth field (rows, height, width) through control points (rows, points, points).

    Source: Ronneberger et al., U-Net, arXiv 1505.04597, section 3.1 (a coarse grid, cubic in between).
    """
    points = bend.shape[-1]
    down, across = _weights(points, height), _weights(points, width)
    lines = torch.zeros((len(bend), height, points))
    for point in range(points):
        lines = lines + down[None, :, point, None] * bend[:, None, point, :]
    field = torch.zeros((len(bend), height, width))
    for point in range(points):
        field = field + lines[:, :, point, None] * across[None, None, :, point]
    return field


@lru_cache(maxsize=16)
def _weights(points: int, side: int) -> Tensor:
    """(side, points): share of each control point in each pixel, by a cubic spline from edge to edge."""
    from scipy.interpolate import CubicSpline

    spline = CubicSpline(np.linspace(0, 1, points), np.eye(points))
    return _float32(spline(np.linspace(0, 1, side)))


def _float32(values: object) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
