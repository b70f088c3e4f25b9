"""Memory that a step frees stays with the process until the round is over.

A chunk takes and frees tens of megabytes. Linux' usual allocator hands such blocks back to the system at once
and gets them anew, page by page, each cleared: a tenth of a step's time and more (docs/decisions/0013).
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
"""Numbers of glibc's mallopt(3)."""
_LARGEST_HEAP_BLOCK = 2**25
"""Larger ones cannot be kept; glibc's own limit."""
_USUAL = 2**17


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep what is freed inside; hand it back at the end. Does nothing on systems without glibc."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_ARENA_MAX, 1)
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_TOP_PAD, _LARGEST_HEAP_BLOCK)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_HEAP_BLOCK)
        libc.mallopt(_TOP_PAD, _USUAL)
        libc.malloc_trim(0)


def hand_back() -> None:
    """Hand back what is free: blocks of another size, which are taken next, would lie beside it."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
