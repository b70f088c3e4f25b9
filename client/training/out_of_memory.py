"""Memory that does not suffice, of a GPU or of the machine, told with what can be done about it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.errors import FederationError, printable

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What torch says in a plain RuntimeError."""


@contextmanager
def explained_memory(*, physical_batch_size: int, device: torch.device) -> Iterator[None]:
    """Turn running out of memory into a FederationError in three lines; anything else passes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        words = printable((str(error).splitlines() or ["out of memory"])[0], most=100)
        raise FederationError(
            f"a private step does not fit into the memory of {device}",
            why=f"{physical_batch_size} images are computed at once (training.physical-batch-size); {words}",
            fix="ask the operator for a smaller training.physical-batch-size (the result stays the same), "
            "free the device, or set site.device = 'cpu'",
        ) from None


def _is_about_memory(error: MemoryError | RuntimeError) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error).lower()
    return any(part in words for part in _NO_MEMORY)
