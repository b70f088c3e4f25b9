"""Environment of the server's processes: Flower's, and an allocator that gives memory back.

glibc keeps an arena per thread and core, and after the first large block that is freed it keeps all others of
that size: with 40 threads that handle pieces of megabytes a process would never shrink to what it needs. A
fixed threshold has every large block mapped by itself, and unmapped when it is freed.
"""

from pathlib import Path

from common.flower_programs import flower_environment

_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(128 * 2**10),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**10),
}


def lean_environment(home: Path, **extra: str) -> dict[str, str]:
    """As `flower_environment`, for SuperLink, front and server process."""
    return flower_environment(home, **_ALLOCATOR, **extra)
