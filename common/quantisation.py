"""Updates in whole numbers on a public grid: 8 or 4 bits for each number instead of 32.

The server announces with the plan of a round one spacing g for each parameter, a power of two, the same for
all hospitals, and to each hospital its weight w, the public enrolled count. The hospital rounds x = w d / g
for its update d stochastically: to floor(x) + 1 with probability x - floor(x), else to floor(x), so that the
mean is x (Gupta et al. 2015, section 3; Alistarh et al. 2017, QSGD). The average over those who answered is

    g * sum of the whole numbers / sum of their weights,

exact up to one rounding to float32, whoever is missing.

Privacy: what is rounded is the update after its noise, with public numbers and randomness of its own, so it
is post-processing and costs nothing. Nothing of the error is kept for the next round.

A whole number beyond +-127 (+-7 with 4 bits) does not fit. It travels as +-127 and, beside the others, its
place and what it lacks, in 8 bytes; where that is so for more than one in eight, all travel in 32 bits. So
nothing is cut off short of MOST, 2**31 - 1 spacings: a spacing that is too fine costs bytes, not truth.
Numbers that are not finite get a mark that every server refuses.

Overflow: the sum of K hospitals is at most K * 2**31. With K up to `server_settings.MOST_HOSPITALS`, 2**20,
that is 2**51: exact in int64, and exact as a float64, in any order. The configuration refuses more hospitals.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord

from common.errors import WireError
from common.parameters import Layout, Template, arrays_in, content_of, num_parameters, split
from common.privacy.randomness import Stream

LARGEST = {8: 127, 4: 7}
"""Largest whole number that fits, by bits."""
MOST = 2**31 - 1
"""Largest whole number of a grid at all."""
LARGEST_WEIGHT = 10**9
SMALLEST_MODEL = 4096
"""Models with fewer numbers travel as float32: a ledger receipt alone has as many bytes as they."""
_EXPONENTS = range(-100, 101)
"""Base-2 logarithms of spacings that make sense for float32 numbers."""
_SHARE_BESIDE = 8
"""At most one number in so many travels beside the others."""
_NOT_FINITE = -(2**31)
_BLOCK = 1 << 16
_LEVELS, _PLACES, _REST, _EXPONENTS_SENT, _WEIGHT = "levels", "places", "rest", "exponents", "weight"
_ALL = (_LEVELS, _PLACES, _REST, _EXPONENTS_SENT, _WEIGHT)

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The public grid of one round."""

    bits: int
    """8 or 4."""
    exponents: tuple[int, ...]
    """Base-2 logarithm of the spacing of each parameter, parameters in name order."""

    def __post_init__(self) -> None:
        if self.bits not in LARGEST or not all(exponent in _EXPONENTS for exponent in self.exponents):
            raise ValueError(
                f"a grid has 8 or 4 bits and exponents from {_EXPONENTS[0]} to {_EXPONENTS[-1]}, "
                f"got {self.bits} bits and {[e for e in self.exponents if e not in _EXPONENTS][:4]}"
            )

    @property
    def largest(self) -> int:
        """Largest whole number that fits."""
        return LARGEST[self.bits]

    def scales(self, template: Template) -> Iterator[tuple[slice, float]]:
        """The stretch of each parameter in the flat update, and its spacing."""
        sizes = [math.prod(template[name]) for name in sorted(template)]
        ends = [0, *np.cumsum(sizes).tolist()]
        for (start, stop), exponent in zip(pairwise(ends), self.exponents, strict=True):
            yield slice(start, stop), 2.0**exponent


def bits_of(asked: int, num_numbers: int) -> int:
    """Bits for each number of an update of a model of this size where the plan says `asked`."""
    return asked if num_numbers >= SMALLEST_MODEL else 32


@dataclass(frozen=True, kw_only=True)
class Levels:
    """An update in whole numbers, flat, parameters in name order: `fitting`, plus `rest` at `places`."""

    fitting: npt.NDArray[np.int8]
    """(numbers,)."""
    places: npt.NDArray[np.uint32]
    """(m,) increasing."""
    rest: npt.NDArray[np.int32]
    """(m,)."""

    def whole(self, stretch: slice) -> npt.NDArray[np.int64]:
        """The whole numbers of a stretch."""
        start, stop, _ = stretch.indices(len(self.fitting))
        result = self.fitting[start:stop].astype(np.int64)
        first, last = np.searchsorted(self.places, (start, stop))
        result[self.places[first:last] - start] += self.rest[first:last]
        return result


def round_stochastically(
    values: npt.NDArray[np.float64], uniform: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Whole numbers whose mean is `values`, from as many uniform numbers in [0, 1).

    Example: 2.25 becomes 3 where the uniform number is below 0.25, else 2.
    """
    below = np.floor(values)
    return below + (uniform < values - below)


def quantised(
    update: Mapping[str, npt.NDArray[np.float32]], *, grid: Grid, weight: int, stream: Stream
) -> Arrays:
    """The update as it travels: named arrays of integers, see `levels_from`."""
    template = {name: array.shape for name, array in update.items()}
    names, total = sorted(update), num_parameters(template)
    whole = np.empty(total, dtype=np.int32)
    for name, (stretch, spacing) in zip(names, grid.scales(template), strict=True):
        flat = update[name].reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK].astype(np.float64)
            block *= weight / spacing
            finite = np.isfinite(block)
            block[~finite] = 0.0
            rounded = np.clip(round_stochastically(block, stream.uniform(len(block))), -MOST, MOST)
            rounded[~finite] = _NOT_FINITE
            whole[stretch.start + start :][: len(block)] = rounded
    return _packed(whole, grid) | {
        _EXPONENTS_SENT: np.array(grid.exponents, dtype=np.int16),
        _WEIGHT: np.array([weight], dtype=np.int64),
    }


def is_quantised(arrays: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Whether these are an update in whole numbers, and not parameters by name."""
    return set(arrays) == set(_ALL) and all(array.dtype.kind in "iu" for array in arrays.values())


def _packed(whole: npt.NDArray[np.int32], grid: Grid) -> Arrays:
    """The narrowest form: what fits in few bits and the rest beside it, or all in 32 bits."""
    outside = (whole > grid.largest) | (whole < -grid.largest)
    places = np.flatnonzero(outside).astype(np.uint32)
    if len(places) > len(whole) // _SHARE_BESIDE:
        return {_LEVELS: whole, _PLACES: places[:0], _REST: whole[:0]}
    fitting = np.clip(whole, -grid.largest, grid.largest).astype(np.int8)
    rest = whole[places] - fitting[places]
    return {_LEVELS: fitting if grid.bits == 8 else _nibbles(fitting), _PLACES: places, _REST: rest}


def _nibbles(fitting: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Two numbers in each byte, the first in the lower half."""
    halves = np.append(fitting, np.int8(0)) if len(fitting) % 2 else fitting
    pairs = (halves & 15).view(np.uint8)
    packed: npt.NDArray[np.uint8] = pairs[0::2] | np.left_shift(pairs[1::2], 4, dtype=np.uint8)
    return packed


def _from_nibbles(pairs: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int8]:
    halves = np.empty(2 * len(pairs), dtype=np.int8)
    halves[0::2] = (pairs << 4).view(np.int8) >> 4
    halves[1::2] = pairs.view(np.int8) >> 4
    if halves[count:].any():
        raise WireError("the update holds more numbers than the model")
    return halves[:count]


def levels_from(record: ArrayRecord, template: Template, *, grid: Grid, weight: int) -> Levels:
    """Read an update on the announced grid and check everything about it. Raises WireError.

    One safetensors file with `levels` (I8, U8 with two numbers in each byte, or I32), `places` (U32) and
    `rest` (I32) of those that do not fit, `exponents` (I16) and `weight` (I64) as announced. Sizes come
    first: nothing is made of the values before the header is exactly that of a model of these shapes.
    """
    total = num_parameters(template)
    beside = total // _SHARE_BESIDE
    content = content_of(record, num_bytes=4 * total + 2 * len(template) + 8, names=_ALL)
    arrays = arrays_in(content, _layout(content, grid, total=total, beside=beside, parameters=len(template)))
    if tuple(arrays[_EXPONENTS_SENT].tolist()) != grid.exponents or arrays[_WEIGHT].tolist() != [weight]:
        raise WireError("the update lies on another grid than the announced one")
    levels, places, rest = arrays[_LEVELS], arrays[_PLACES], arrays[_REST]
    if levels.dtype == np.int32:
        if levels.size and levels.min() < -MOST:
            raise WireError("the update holds numbers that are not finite")
        return _unpacked(levels)
    fitting = levels if grid.bits == 8 else _from_nibbles(levels, total)
    narrow = Levels(fitting=fitting, places=places, rest=rest)
    _check_range(narrow, grid)
    return narrow


def _layout(content: bytes, grid: Grid, *, total: int, beside: int, parameters: int) -> Layout:
    """What the header must say, for the form that it says it has."""
    header, _ = split(content)
    kind = _field(header, _LEVELS, "dtype")
    shape = _field(header, _PLACES, "shape")
    count = shape[0] if isinstance(shape, list) and len(shape) == 1 else None
    if type(count) is not int or not 0 <= count <= (0 if kind == "I32" else beside):
        raise WireError("the update holds too many numbers that do not fit")
    narrow = ("I8", (total,)) if grid.bits == 8 else ("U8", (-(-total // 2),))
    return {
        _LEVELS: ("I32", (total,)) if kind == "I32" else narrow,
        _PLACES: ("U32", (count,)),
        _REST: ("I32", (count,)),
        _EXPONENTS_SENT: ("I16", (parameters,)),
        _WEIGHT: ("I64", (1,)),
    }


def _field(header: Mapping[str, Any], name: str, field: str) -> Any:
    entry = header.get(name)
    return entry.get(field) if isinstance(entry, dict) else None


def _unpacked(levels: npt.NDArray[np.int32]) -> Levels:
    """The same numbers in the narrow form."""
    fitting = np.clip(levels, -LARGEST[8], LARGEST[8]).astype(np.int8)
    places = np.flatnonzero(levels != fitting).astype(np.uint32)
    return Levels(fitting=fitting, places=places, rest=levels[places] - fitting[places])


def _check_range(levels: Levels, grid: Grid) -> None:
    """Every number within the bits, and beside it only what does not fit, once, in order."""
    fitting, places, rest = levels.fitting, levels.places, levels.rest
    if fitting.size and not -grid.largest <= int(fitting.min()) <= int(fitting.max()) <= grid.largest:
        raise WireError(f"the update holds numbers beyond {grid.largest} where {grid.bits} bits are agreed")
    if places.size == 0:
        return
    if int(places[-1]) >= len(fitting) or not (places[1:] > places[:-1]).all():
        raise WireError("the update's places are not increasing places of the model")
    at = fitting[places].astype(np.int64)
    beyond = np.abs(at + rest)
    # The sign of the rest is that of the number at its place, which is as large as it can be.
    if not ((np.abs(at) == grid.largest) & (np.sign(at) == np.sign(rest)) & (beyond <= MOST)).all():
        raise WireError("the update holds numbers beside the others that would fit, or are not finite")


def levels_norm(levels: Levels, template: Template, *, grid: Grid, weight: int) -> float:
    """Euclidean norm of the update that the whole numbers stand for."""
    square = 0.0
    for stretch, spacing in grid.scales(template):
        for start in range(stretch.start, stretch.stop, _BLOCK):
            block = levels.whole(slice(start, min(start + _BLOCK, stretch.stop))).astype(np.float64)
            square += float(np.sum(np.square(block, out=block))) * spacing**2
    return math.sqrt(square) / weight


def rounding_norm(template: Template, *, grid: Grid, weight: int) -> float:
    """What rounding adds to the norm of an update at most: less than a spacing in every number."""
    return math.sqrt(sum((s.stop - s.start) * g**2 for s, g in grid.scales(template))) / weight
