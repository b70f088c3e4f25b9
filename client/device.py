"""Which device trains: `auto`, `cpu` or `cuda:N`; and training that gives the same bits each time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.errors import ConfigError


def resolve_device(wanted: str) -> torch.device:
    """The torch device for a `--device` value; raises ConfigError for a GPU that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no device {wanted}",
            why=f"torch sees {torch.cuda.device_count()} CUDA device(s)",
            fix="use --device cpu, or auto",
        )
    return device


@contextmanager
def reproducible_kernels(wanted: bool) -> Iterator[None]:
    """While `wanted`: one thread and deterministic kernels, so that sums do not change from run to run.

    CUDA reads CUBLAS_WORKSPACE_CONFIG when it begins; a process that lives long sets it at its start.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    torch.set_num_threads(1)
    # The same as torch.use_deterministic_algorithms(True), which imports the compiler to tell it.
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.set_num_threads(threads)
