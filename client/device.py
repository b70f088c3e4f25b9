"""Which device trains: `auto`, `cpu` or `cuda:N`."""

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
