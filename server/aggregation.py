"""From the hospitals' updates to one: rules on blocks of numbers, applied block by block.

A rule sees the same stretch of every hospital's flattened update, in roster order, and gives that stretch
of the result. Any rule that treats coordinates one by one (mean, median, trimmed mean) is such a function.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Block = npt.NDArray[np.float32]


class Vector(Protocol):
    """A flat update that gives stretches of itself: an array, or numbers on disk."""

    def __len__(self) -> int:
        """Count of numbers."""
        ...

    def __getitem__(self, stretch: slice, /) -> Block:
        """The numbers of one stretch."""
        ...


AggregationRule = Callable[[Sequence[Block], Sequence[float]], npt.NDArray[np.float64]]
"""(blocks of equal length in roster order, weights in roster order) -> block of the aggregate."""

_LONGEST_BLOCK, _NUMBERS_AT_ONCE = 2**18, 2**24


def weighted_mean(blocks: Sequence[Block], weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """Sum of w_k x_k over sum of w_k (FedAvg, McMahan et al. 2017, algorithm 1), float64 in roster order.

    Example: blocks [1, 2] and [4, 8] with weights 1 and 3 give [3.25, 6.5].
    """
    total = np.zeros(blocks[0].shape, dtype=np.float64)
    for block, weight in zip(blocks, weights, strict=True):
        total += weight * block.astype(np.float64)
    return total / float(sum(weights))


def aggregate(
    vectors: Sequence[Vector],
    weights: Sequence[float],
    *,
    rule: AggregationRule = weighted_mean,
    block_length: int | None = None,
) -> npt.NDArray[np.float32]:
    """Aggregate flat updates, maybe on disk, block by block; weights are positive.

    Needs the memory of one result and 64 MiB of blocks, whatever the number of hospitals. Raises
    ValueError for no update, other lengths or a weight that is not positive.
    """
    if not vectors or len(vectors) != len(weights) or not all(weight > 0 for weight in weights):
        raise ValueError(f"need as many positive weights as updates, got {len(weights)} and {len(vectors)}")
    length = len(vectors[0])
    if any(len(vector) != length for vector in vectors):
        raise ValueError("updates of different lengths cannot be aggregated")
    block_length = block_length or min(_LONGEST_BLOCK, max(1, _NUMBERS_AT_ONCE // len(vectors)))
    result = np.empty(length, dtype=np.float32)
    for start in range(0, length, block_length):
        stretch = slice(start, start + block_length)
        result[stretch] = rule([vector[stretch] for vector in vectors], weights)
    return result
