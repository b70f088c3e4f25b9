"""From the hospitals' updates to one: flat updates on disk, reduced block by block in roster order.

Blocks and their sums stay in the processor's cache, and every update is read once, so the speed is that of
memory, and memory is that of one result whatever the number of hospitals.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.quantisation import LARGEST
from common.server_settings import MOST_HOSPITALS
from server.spool import SpooledLevels

Block = npt.NDArray[np.float32]


class Vector(Protocol):
    """A flat update that gives stretches of itself."""

    def __len__(self) -> int:
        """Count of numbers."""

    def read(self, start: int, out: Block, /) -> None:
        """Fill `out` with the numbers from `start` on."""


AggregationRule = Callable[[Sequence[Block], Sequence[float]], npt.NDArray[np.float64]]
"""(blocks of equal length in roster order, weights in roster order) -> block of the aggregate.

Any rule that treats coordinates one by one (median, trimmed mean) is such a function.
"""

_BLOCK, _BLOCK_OF_LEVELS, _NUMBERS_AT_ONCE = 2**15, 2**16, 2**24
_AT_ONCE = (2**15 - 1) // LARGEST[8]
"""So many int8 of at most 127 add up in int16: 258."""


def aggregate(
    vectors: Sequence[Vector],
    weights: Sequence[float],
    *,
    rule: AggregationRule | None = None,
    block_length: int | None = None,
) -> npt.NDArray[np.float32]:
    """Sum of w_k x_k over sum of w_k (FedAvg, McMahan et al. 2017, algorithm 1), float64 in roster order.

    Example: updates [1, 2] and [4, 8] with weights 1 and 3 give [3.25, 6.5]. Another `rule` sees the same
    stretch of all updates at once: 64 MiB of blocks, whatever the number of hospitals. Raises ValueError for
    no update, other lengths or a weight that is not positive.
    """
    if not vectors or len(vectors) != len(weights) or not all(weight > 0 for weight in weights):
        raise ValueError(f"need as many positive weights as updates, got {len(weights)} and {len(vectors)}")
    length = _common_length(vectors)
    result = np.empty(length, dtype=np.float32)
    if rule is None:
        _weighted_mean(vectors, weights, result, block_length=block_length or _BLOCK)
        return result
    block_length = block_length or min(_BLOCK, max(1, _NUMBERS_AT_ONCE // len(vectors)))
    for start in range(0, length, block_length):
        stretch = result[start : start + block_length]
        blocks = [np.empty(len(stretch), dtype=np.float32) for _ in vectors]
        for vector, block in zip(vectors, blocks, strict=True):
            vector.read(start, block)
        stretch[:] = rule(blocks, weights)
    return result


def _weighted_mean(
    vectors: Sequence[Vector], weights: Sequence[float], result: Block, *, block_length: int
) -> None:
    whole_weight = float(sum(weights))
    narrow = np.empty(block_length, dtype=np.float32)
    wide, total = np.empty(block_length), np.empty(block_length)
    for start in range(0, len(result), block_length):
        stretch = result[start : start + block_length]
        block, product, sums = narrow[: len(stretch)], wide[: len(stretch)], total[: len(stretch)]
        sums.fill(0)
        for vector, weight in zip(vectors, weights, strict=True):
            vector.read(start, block)
            product[:] = block  # faster than a multiplication that converts
            product *= weight
            sums += product
        sums /= whole_weight
        stretch[:] = sums


def mean_on_grid(
    updates: Sequence[SpooledLevels], *, total_weight: int, scales: Iterable[tuple[slice, float]]
) -> npt.NDArray[np.float32]:
    """Spacing times the sum of whole numbers over `total_weight`; hospitals have applied their own weights.

    The sums are exact, so no order matters: int8 in int16 for 258 hospitals at a time, these in int64, and up
    to MOST_HOSPITALS hospitals exact as float64 (`common.quantisation`). `scales` are stretch and spacing of
    each parameter; spacings are powers of two. Raises ValueError for no update, too many, or other lengths.
    """
    if not 1 <= len(updates) <= MOST_HOSPITALS or total_weight < 1:
        raise ValueError(f"need 1 to {MOST_HOSPITALS} updates with a weight, got {len(updates)}")
    length = _common_length(updates)
    result = np.empty(length, dtype=np.float32)
    narrow = np.empty(_BLOCK_OF_LEVELS, dtype=np.int8)
    part, total = np.empty(_BLOCK_OF_LEVELS, np.int16), np.empty(_BLOCK_OF_LEVELS, np.int64)
    starts = np.arange(0, length + _BLOCK_OF_LEVELS, _BLOCK_OF_LEVELS)
    cuts = [update.cuts(starts).tolist() if update.beside else [] for update in updates]
    for index, start in enumerate(range(0, length, _BLOCK_OF_LEVELS)):
        stretch = result[start : start + _BLOCK_OF_LEVELS]
        block, few, sums = narrow[: len(stretch)], part[: len(stretch)], total[: len(stretch)]
        sums.fill(0)
        for first in range(0, len(updates), _AT_ONCE):
            few.fill(0)
            for update in updates[first : first + _AT_ONCE]:
                update.read(start, block)
                few += block
            sums += few
        for update, cut in zip(updates, cuts, strict=True):
            if cut and cut[index] < cut[index + 1]:
                places, rest = update.rest(cut[index], cut[index + 1])
                sums[places - start] += rest
        stretch[:] = sums / total_weight
    for place, spacing in scales:
        result[place] *= np.float32(spacing)
    return result


def _common_length(vectors: Sequence[Vector] | Sequence[SpooledLevels]) -> int:
    length = len(vectors[0])
    if any(len(vector) != length for vector in vectors):
        raise ValueError("updates of different lengths cannot be aggregated")
    return length
