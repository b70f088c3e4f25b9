"""The plain networks: logistic regression and stacks of convolutions.

Every builder takes a ModelSpec and returns layers that map float32 (rows, channels, image_size, image_size)
to (rows, num_outputs). Only `softmax` and `cnn-flatten` grow with the image; the others average their last
map to a fixed grid.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from common.config import ModelSpec
from common.models.private_layers import SMALL_IMAGE, activation, grid_pool, group_norm


@dataclass(frozen=True, kw_only=True)
class Block:
    """A 3 x 3 convolution with GroupNorm and activation."""

    channels: int
    """Output channels."""
    stride: int = 1
    """Step of the convolution."""
    pool: int = 1
    """Side of the max-pooling after it; 1 is none."""


@dataclass
class Trunk:
    """Layers so far, and the shape (channels, side, side) of what they put out."""

    layers: OrderedDict[str, nn.Module]
    channels: int
    side: int


def softmax(spec: ModelSpec) -> nn.Module:
    """Multinomial logistic regression; convex, so it has no activation."""
    inputs = spec.channels * spec.image_size**2
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), output=nn.Linear(inputs, spec.num_outputs)))


def cnn1(spec: ModelSpec) -> nn.Module:
    """One block of 16 channels, read on a 7 x 7 grid."""
    return read_on_grid(_trunk(spec, [Block(channels=16, pool=2)]), grid=7, outputs=spec.num_outputs)


def cnn2(spec: ModelSpec) -> nn.Module:
    """Two blocks 16/32, read on a 4 x 4 grid."""
    blocks = [Block(channels=16, pool=2), Block(channels=32, pool=2)]
    return read_on_grid(_trunk(spec, blocks), grid=4, outputs=spec.num_outputs)


def cnn(spec: ModelSpec) -> nn.Module:
    """Three blocks 32/64/128, read on a 3 x 3 grid."""
    return read_on_grid(_trunk(spec, _three_blocks()), grid=3, outputs=spec.num_outputs)


def cnn_small(spec: ModelSpec) -> nn.Module:
    """Three blocks 16/32/32 that halve the map by striding, read on a 3 x 3 grid.

    Few parameters, because the noise of DP-SGD grows with the root of their number; strided from the first
    layer, because a hospital's step costs in proportion to the pixels it looks at.
    """
    return read_on_grid(small_trunk(spec), grid=3, outputs=spec.num_outputs)


def small_trunk(spec: ModelSpec) -> Trunk:
    """The convolutions of `cnn-small`."""
    blocks = [Block(channels=16, stride=2), Block(channels=32, stride=2), Block(channels=32, stride=2)]
    return _trunk(spec, blocks)


def cnn_flatten(spec: ModelSpec) -> nn.Module:
    """Three blocks 32/64/128, flattened into 512 hidden units: the usual network of the literature.

    Its hidden layer has 512 * 128 * (image_size // 8)**2 weights: 0.6 million at 28 px, 51 million at 224 px.
    """
    trunk = _trunk(spec, _three_blocks())
    trunk.layers["flatten"] = nn.Flatten()
    trunk.layers["hidden"] = nn.Linear(trunk.channels * trunk.side**2, 512)
    trunk.layers["activation_hidden"] = activation(spec.activation)
    trunk.layers["output"] = nn.Linear(512, spec.num_outputs)
    return nn.Sequential(trunk.layers)


def vgg11(spec: ModelSpec) -> nn.Module:
    """VGG-11."""
    return _vgg(spec, (1, 1, 2, 2, 2))


def vgg13(spec: ModelSpec) -> nn.Module:
    """VGG-13."""
    return _vgg(spec, (2, 2, 2, 2, 2))


def vgg16(spec: ModelSpec) -> nn.Module:
    """VGG-16."""
    return _vgg(spec, (2, 2, 3, 3, 3))


BUILDERS: Mapping[str, Callable[[ModelSpec], nn.Module]] = MappingProxyType(
    {
        "softmax": softmax,
        "cnn1": cnn1,
        "cnn2": cnn2,
        "cnn": cnn,
        "cnn-small": cnn_small,
        "cnn-flatten": cnn_flatten,
        "vgg11": vgg11,
        "vgg13": vgg13,
        "vgg16": vgg16,
    }
)


def _three_blocks() -> list[Block]:
    return [Block(channels=channels, pool=2) for channels in (32, 64, 128)]


def _vgg(spec: ModelSpec, convolutions: Sequence[int]) -> nn.Module:
    """VGG with as many convolutions before each of its five poolings, its last map averaged.

    The two hidden layers of 4,096 units, nine tenths of the published network's weights, are left out: the
    noise of DP-SGD grows with the root of their number. Below 64 px the first pooling is left out, too, or
    nothing would be left for the last.
    Source: Simonyan and Zisserman, Very Deep Convolutional Networks, arXiv 1409.1556, table 1, A, B and D.
    """
    blocks = []
    for stage, (channels, count) in enumerate(zip((64, 128, 256, 512, 512), convolutions, strict=True)):
        pool = 1 if stage == 0 and spec.image_size < SMALL_IMAGE else 2
        blocks += [Block(channels=channels)] * (count - 1) + [Block(channels=channels, pool=pool)]
    return read_on_grid(_trunk(spec, blocks), grid=1, outputs=spec.num_outputs)


def _trunk(spec: ModelSpec, blocks: Sequence[Block]) -> Trunk:
    trunk = Trunk(layers=OrderedDict(), channels=spec.channels, side=spec.image_size)
    for number, block in enumerate(blocks, start=1):
        trunk.layers[f"convolution{number}"] = nn.Conv2d(
            trunk.channels, block.channels, kernel_size=3, stride=block.stride, padding=1
        )
        trunk.layers[f"norm{number}"] = group_norm(block.channels)
        trunk.layers[f"activation{number}"] = activation(spec.activation)
        if block.pool > 1:
            trunk.layers[f"pool{number}"] = nn.MaxPool2d(block.pool)
        # Padding 1 keeps every pixel under a 3 x 3 kernel, so striding rounds up; pooling rounds down.
        trunk.side = -(-trunk.side // block.stride) // block.pool
        trunk.channels = block.channels
    return trunk


def read_on_grid(trunk: Trunk, *, grid: int, outputs: int) -> nn.Module:
    """Average the last map to (grid, grid) cells and read them with a linear layer, `output`."""
    trunk.layers["grid"] = grid_pool(trunk.side, grid=grid)
    trunk.layers["flatten"] = nn.Flatten()
    trunk.layers["output"] = nn.Linear(trunk.channels * grid**2, outputs)
    return nn.Sequential(trunk.layers)
