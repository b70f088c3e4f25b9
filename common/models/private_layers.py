"""Layers that keep records apart, and the refusal of those that do not.

Under DP-SGD the gradient of a record must not depend on the other records of its batch, and a model must
store nothing about them. So: GroupNorm instead of BatchNorm, no buffers, no in-place activation (Opacus
hooks read the layer's output after it was computed), exact torch types (the hooks dispatch on the type).
"""

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from common.errors import BatchNormError

SMALL_IMAGE = 64
"""Pixels of a side below which deep networks leave out halvings of their first layers."""


def activation(name: Literal["tanh", "relu"]) -> nn.Module:
    """A non-linearity that leaves its input as it was."""
    return nn.Tanh() if name == "tanh" else nn.ReLU(inplace=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 8 groups of at least 4 channels each; the groups divide `channels`.

    A group of one channel (InstanceNorm) would erase how strongly the channel answers.
    Source: Wu and He, Group Normalization, arXiv 1803.08494.
    """
    groups = next(groups for groups in range(8, 0, -1) if channels % groups == 0 and channels >= 4 * groups)
    return nn.GroupNorm(groups, channels)


def grid_pool(side: int, *, grid: int) -> nn.Module:
    """Average a (side, side) map to (grid, grid) cells of one size that cover it all; needs side >= grid.

    The windows are fixed here, from the image size, and may overlap. torch's adaptive pooling chooses them
    per call and has no deterministic gradient on CUDA.
    """
    if side < grid:
        raise ValueError(f"a map of side {side} has no {grid} x {grid} cells")
    stride = side // grid
    kernel = side - (grid - 1) * stride
    return nn.Identity() if kernel == 1 else nn.AvgPool2d(kernel, stride)


def refuse_batch_norm(model: nn.Module) -> None:
    """Raise BatchNormError naming every layer of `model` that couples or remembers records.

    BatchNorm couples them whatever its parameters: also frozen, with affine=False or without running
    statistics. InstanceNorm does not couple, but with running statistics it stores private data.
    """
    found = [
        f"{name or 'the model itself'} ({type(layer).__name__})"
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) or (isinstance(layer, _InstanceNorm) and layer.track_running_stats)
    ]
    if found:
        raise BatchNormError(
            f"this model cannot be trained under differential privacy: {', '.join(found)}",
            why="they mix the patients of a batch or keep statistics of them, which no clipping undoes",
            fix="use GroupNorm in their place",
        )
