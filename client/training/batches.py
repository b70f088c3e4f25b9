"""Which rows are computed together: rows of the sampled patients, cut into chunks that fit in memory.

A logical batch decides what is learned and what privacy costs; a chunk only bounds memory. All rows of a unit
(patient) lie in one chunk, because a patient's gradient is clipped as a whole. Every chunk is filled up with
rows of zeros to one number of rows, which follows from public numbers: libraries choose another kernel by
the number of rows, so that otherwise one patient more would change the last bits of all rows computed
together, and a server that picks the weights can make last bits large (docs/decisions/0011).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.examples import Examples, UnitRows
from common.preprocessing import Preprocessing
from common.privacy.randomness import RandomnessSource, Stream

CHUNK_BYTES = 256 * 2**20
"""Per-row gradients and activations of what is computed at once stay below about this."""
CHUNK_ROWS = 64
"""Rows of a chunk where memory allows: half of them are filled up in vain in the last chunk of a step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Rows that go through the network together."""

    rows: NDArray[np.int64]
    """(rows,) numbers of rows in the table."""
    segments: NDArray[np.int64]
    """(rows,) unit of each row within the chunk, 0..num_units-1, never decreasing."""
    num_units: int
    """Units (patients) in the chunk, each with all its rows."""


def sampled_rows(
    units: NDArray[np.int64], unit_rows: UnitRows, *, max_rows_per_unit: int, stream: Stream
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of `units`, at most `max_rows_per_unit` of each, and the segment (0, 1, ... in order) of each row.

    Where a unit has more, a fresh uniform choice without replacement is made; units without rows (they
    contribute nothing) keep their segment number.
    """
    offsets, rows = unit_rows
    counts = offsets[units + 1] - offsets[units]
    segments = np.repeat(np.arange(len(units), dtype=np.int64), counts)
    ranks = _ranks(counts)
    picked = rows[offsets[units][segments] + ranks]
    if len(picked) == 0 or counts.max() <= max_rows_per_unit:
        return picked, segments
    # Rank the rows of each unit by a random key and keep the first ones.
    order = np.lexsort((stream.uniform(len(picked)), segments))
    kept = order[ranks < max_rows_per_unit]
    return picked[kept], segments[kept]


def chunks_of_units(
    rows: NDArray[np.int64], segments: NDArray[np.int64], *, max_rows: int
) -> Iterator[Chunk]:
    """Cut rows into chunks of at most `max_rows` (more only where one unit has more); none for no rows.

    Units with many rows come first, so that others fill up what is left: chunks are filled up anyway.
    """
    if len(rows) == 0:
        return
    _, starts, lengths = np.unique(segments, return_index=True, return_counts=True)
    for units in _packed(lengths, most=max_rows):
        yield Chunk(
            rows=np.concatenate([rows[starts[unit] : starts[unit] + lengths[unit]] for unit in units]),
            segments=np.repeat(np.arange(len(units), dtype=np.int64), lengths[units]),
            num_units=len(units),
        )


def _packed(lengths: NDArray[np.int64], *, most: int) -> list[list[int]]:
    """Numbers of the units in each chunk: each goes where it leaves least free, the longest first."""
    chunks: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    for unit in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[unit])
        room = next((room for room in range(length, most) if with_room.get(room)), None)
        if room is None:
            chunks.append([])
            chunk, room = len(chunks) - 1, max(most, length)
        else:
            chunk = with_room[room].pop()
        chunks[chunk].append(unit)
        with_room.setdefault(room - length, []).append(chunk)
    return chunks


def minibatches(
    num_rows: int, *, batch_size: int, steps: int, randomness: RandomnessSource, round_number: int
) -> Iterator[NDArray[np.int64]]:
    """Yield `steps` batches of row numbers without replacement; a new order whenever all rows were seen.

    The last batch of an epoch may be smaller. For training without privacy only: shuffling is not Poisson
    sampling, and no epsilon may be stated for it.
    """
    if num_rows < 1:
        raise ValueError("no rows to train on")
    batches_per_epoch = -(-num_rows // batch_size)
    for step in range(steps):
        epoch, position = divmod(step, batches_per_epoch)
        if position == 0:
            stream = randomness.stream(purpose="shuffle", round_number=round_number, step=epoch)
            order = np.asarray(stream.permutation(num_rows), dtype=np.int64)
        yield order[position * batch_size : (position + 1) * batch_size]


def bytes_per_row(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Estimate the memory of one row in a step with per-row gradients; depends on no data.

    Counts what the layers put out and its gradient, and the row's gradient of convolutions.
    """
    outputs = [0]

    def count(layer: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not list(layer.children()):
            outputs.append(output.numel())

    handles = [layer.register_forward_hook(count) for layer in model.modules()]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *input_shape, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    gradients = sum(p.numel() for p in model.parameters() if p.dim() > 2 and p.numel() < 2**18)
    return 4 * (gradients + 2 * sum(outputs))


def rows_per_chunk(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    physical_batch_size: int,
    max_rows_per_unit: int = 1,
    expected_units: float = CHUNK_ROWS,
    lanes: int = 1,
) -> int:
    """Rows of every chunk, a power of two, for as many chunks at once as there are `lanes`.

    At most a lane's share of CHUNK_ROWS, of `physical_batch_size`, of what CHUNK_BYTES hold; more only where
    one unit has more. Fewer where few are expected in a step: what fills a chunk up costs as much as they do.
    Depends on public numbers alone.
    """
    expected = math.ceil(1.25 * min(expected_units, CHUNK_ROWS) * min(max_rows_per_unit, 2)) + 3
    held = CHUNK_BYTES // bytes_per_row(model, input_shape)
    usual = 2 ** (expected - 1).bit_length()
    most = max(1, min(CHUNK_ROWS, physical_batch_size, held, usual) // lanes)
    return int(max(2 ** (most.bit_length() - 1), 2 ** (max_rows_per_unit - 1).bit_length()))


def input_tensor(
    examples: Examples,
    rows: NDArray[np.int64],
    *,
    preprocessing: Preprocessing,
    device: torch.device,
    filled_to: int = 0,
) -> Tensor:
    """Images of `rows` as float32 (rows, channels, height, width), standardised, contiguous.

    With `filled_to` followed by zeros up to that many rows; raises ValueError if there are more already.
    """
    images = torch.from_numpy(np.ascontiguousarray(preprocessing.standardise(examples.inputs["image"][rows])))
    return filled(images, filled_to or len(rows)).to(device)


def target_tensor(
    examples: Examples, rows: NDArray[np.int64], *, device: torch.device, filled_to: int = 0
) -> Tensor:
    """Targets of `rows` as int64 (rows,), filled up as `input_tensor`."""
    return filled(torch.from_numpy(examples.targets[rows]), filled_to or len(rows)).to(device)


def filled(values: Tensor, rows: int) -> Tensor:
    """Copy `values` and append zeros up to `rows` rows; raises ValueError if there are more already."""
    if len(values) > rows:
        raise ValueError(f"a chunk of {len(values)} rows does not fit into {rows}")
    # Torch's own memory: kernels may also depend on how the numbers are aligned, which numpy does not fix.
    result = values.new_zeros((rows, *values.shape[1:]))
    result[: len(values)] = values
    return result


def _ranks(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ..., c - 1 for each c of `counts`, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(ends - counts, counts)
