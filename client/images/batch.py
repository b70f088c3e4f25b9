"""Decode many images: from the cache what it has, the rest on all cores, each content once."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from client.images.cache import DecodeCache, Decoded
from client.images.decode import DecodedImage, guarded_pillow
from client.images.records import SkipReason, Unusable
from common.preprocessing import Preprocessing

_ROWS_PER_JOB = 32
T = TypeVar("T")


def on_all_cores(function: Callable[[int], T], rows: Sequence[int]) -> Iterator[T | SkipReason]:
    """`function(row)` in row order, computed by a thread per core; Unusable becomes its reason.

    Pillow and hashlib release the interpreter lock, so threads are enough and share memory.
    """

    def job(start: int) -> list[T | SkipReason]:
        outcomes: list[T | SkipReason] = []
        for row in rows[start : start + _ROWS_PER_JOB]:
            try:
                outcomes.append(function(row))
            except Unusable as unusable:
                outcomes.append(unusable.reason)
        return outcomes

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for outcomes in pool.map(job, range(0, len(rows), _ROWS_PER_JOB)):
            yield from outcomes


def decode_all(
    contents: Sequence[str],
    decode_row: Callable[[int], DecodedImage],
    *,
    preprocessing: Preprocessing,
    cache: DecodeCache | None,
    max_pixels: int,
) -> Decoded:
    """Decode one image per entry of `contents` (its hash); rows with the same hash are decoded once."""
    if cache is None:
        side = preprocessing.image_size
        pixels = np.zeros((len(contents), preprocessing.channels, side, side), np.uint8)
        return _fill(pixels, contents, decode_row, cache=None, max_pixels=max_pixels)
    found = cache.load(contents)
    if found is not None:
        return found
    path, pixels = cache.allocate(len(contents))
    try:
        decoded = _fill(pixels, contents, decode_row, cache=cache, max_pixels=max_pixels)
        cache.commit(path, contents, decoded)
    finally:
        path.unlink(missing_ok=True)
    return cache.load(contents) or decoded


def _fill(
    pixels: NDArray[np.uint8],
    contents: Sequence[str],
    decode_row: Callable[[int], DecodedImage],
    *,
    cache: DecodeCache | None,
    max_pixels: int,
) -> Decoded:
    first_row: dict[str, int] = {}
    for row, content in enumerate(contents):
        first_row.setdefault(content, row)
    outcome: dict[str, str | SkipReason] = {}
    # 1. What other entries hold already (the data grew).
    for content, entry, entry_row in cache.known(contents) if cache is not None else ():
        pixels[first_row[content]] = entry.pixels[entry_row]
        outcome[content] = entry.failures.get(entry_row) or entry.digests[entry_row]
    # 2. What must be decoded.
    missing = [row for content, row in first_row.items() if content not in outcome]
    with guarded_pillow(max_pixels):
        for row, image in zip(missing, on_all_cores(decode_row, missing), strict=True):
            if isinstance(image, SkipReason):
                outcome[contents[row]] = image
            else:
                pixels[row], outcome[contents[row]] = image
    # 3. Repeated contents.
    for row, content in enumerate(contents):
        if row != first_row[content]:
            pixels[row] = pixels[first_row[content]]
    outcomes = [outcome[content] for content in contents]
    return Decoded(
        pixels=pixels,
        digests=tuple("" if isinstance(found, SkipReason) else found for found in outcomes),
        failures={row: found for row, found in enumerate(outcomes) if isinstance(found, SkipReason)},
    )
