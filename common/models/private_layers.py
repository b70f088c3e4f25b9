"""Layers that keep records apart, and the refusal of those that do not.

Under DP-SGD the gradient of a record must not depend on the other records of its batch, and a model must
store nothing about them. So: GroupNorm instead of BatchNorm, no buffers, no in-place activation (Opacus
hooks read the layer's output after it was computed), exact torch types (the hooks dispatch on the type).
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from common.errors import BatchNormError

SMALL_IMAGE = 64
"""Pixels of a side below which deep networks leave out halvings of their first layers."""
_SMALLEST_VARIANCE = 1e-10
"""Added to the variance of a kernel."""


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


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose kernels have mean 0 and variance 1, whatever the weights are that are trained.

    Source: Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight Standardization,
    arXiv 1903.10520, equations 7 to 9.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """As a convolution with `standardised` weights."""
        outputs: Tensor = self._conv_forward(inputs, standardised(self.weight), self.bias)
        return outputs


def standardised(weight: Tensor) -> Tensor:
    """Kernels (out channels, ...) less their mean, over their standard deviation."""
    kernels, scales = standardised_kernels(weight)
    return (kernels * scales).view_as(weight)


def standardised_kernels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels less their mean, (out channels, taps), and one over their standard deviations, (.., 1)."""
    kernels = weight.flatten(1)
    kernels = kernels - kernels.mean(1, keepdim=True)
    return kernels, (kernels.square().mean(1, keepdim=True) + _SMALLEST_VARIANCE).rsqrt()


def standardise_weights(model: nn.Module) -> int:
    """Put `StandardisedConv2d` in place of each convolution, with the same parameters; returns how many."""
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Conv2d
    ]
    for parent, name, layer in found:
        setattr(parent, name, _with_parameters_of(layer))
    return len(found)


def _with_parameters_of(layer: nn.Conv2d) -> StandardisedConv2d:
    other = StandardisedConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    other.weight, other.bias = layer.weight, layer.bias
    return other.train(layer.training)


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
