"""Networks with shortcuts: torchvision's ResNets, DenseNet-121 and MobileNetV2, with GroupNorm.

Importing torchvision takes a second: the registry loads this module on demand. What torchvision's networks
are changed in, and nothing else, so that their published weights and sizes can be compared:

norm        GroupNorm in place of BatchNorm: as many parameters, but records stay apart
stem        as many channels as the images have; below 64 px two of its halvings are left out, as usual for
            small images: the standard stem would leave a map of one pixel
activation  ReLU whatever `spec.activation` says, for sums of bounded activations saturate; not in place
pooling     averages everything left with a window fixed by the image size: the same numbers as adaptive
            pooling to 1 x 1, with a deterministic gradient on CUDA
dropout     none: it would draw from torch's global generator
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn
from torchvision.models.densenet import DenseNet
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.config import ModelSpec
from common.models.private_layers import SMALL_IMAGE, grid_pool, group_norm


class _PrivateBlock(BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """A block of torchvision without its in-place sum, which backward hooks on the norm layer forbid."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (rows, channels, height, width) to the block's output."""
        shortcut = x if self.downsample is None else self.downsample(x)
        hidden = self.relu(self.bn1(self.conv1(x)))
        out: torch.Tensor = self.relu(self.bn2(self.conv2(hidden)) + shortcut)
        return out


class _PrivateBottleneck(Bottleneck):  # type: ignore[misc]
    """As `_PrivateBlock`, with the 3 x 3 convolution between two of 1 x 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (rows, channels, height, width) to the block's output."""
        shortcut = x if self.downsample is None else self.downsample(x)
        narrow = self.relu(self.bn1(self.conv1(x)))
        hidden = self.relu(self.bn2(self.conv2(narrow)))
        out: torch.Tensor = self.relu(self.bn3(self.conv3(hidden)) + shortcut)
        return out


def resnet18(spec: ModelSpec) -> nn.Module:
    """Two blocks of two convolutions at each of four sizes."""
    return _resnet(spec, _PrivateBlock, (2, 2, 2, 2))


def resnet34(spec: ModelSpec) -> nn.Module:
    """Blocks of two convolutions: 3, 4, 6 and 3."""
    return _resnet(spec, _PrivateBlock, (3, 4, 6, 3))


def resnet50(spec: ModelSpec) -> nn.Module:
    """Bottleneck blocks: 3, 4, 6 and 3."""
    return _resnet(spec, _PrivateBottleneck, (3, 4, 6, 3))


def densenet121(spec: ModelSpec) -> nn.Module:
    """DenseNet-121: each layer reads the maps of all earlier ones of its block.

    Source: Huang et al., Densely Connected Convolutional Networks, arXiv 1608.06993.
    """
    theirs = DenseNet(num_classes=spec.num_outputs)
    features = theirs.features
    for layer in list(features.modules()):
        for name, child in layer.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(layer, name, group_norm(child.num_features))
    features.conv0 = _stem(spec, 64)
    features.relu5 = nn.ReLU()
    if _small(spec):
        features.pool0 = nn.Identity()
    # Stem sizes round up, those between the blocks down.
    side = (spec.image_size if _small(spec) else -(-spec.image_size // 4)) // 8
    return _read_average(features, side=side, output=theirs.classifier)


def mobilenet_v2(spec: ModelSpec) -> nn.Module:
    """MobileNetV2: convolutions of single channels between 1 x 1 ones that widen and narrow.

    Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, arXiv 1801.04381, table 2.
    """
    halving = 1 if _small(spec) else 2
    # Widening, channels, blocks, stride of the first block.
    stages = [
        [1, 16, 1, 1],
        [6, 24, 2, halving],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    theirs = MobileNetV2(spec.num_outputs, inverted_residual_setting=stages, norm_layer=group_norm)
    theirs.features[0][0] = _stem(spec, 32, kernel=3)
    side = -(-spec.image_size // (8 if _small(spec) else 32))
    return _read_average(theirs.features, side=side, output=theirs.classifier[-1])


BUILDERS: Mapping[str, Callable[[ModelSpec], nn.Module]] = MappingProxyType(
    {
        "mobilenet-v2": mobilenet_v2,
        "densenet121": densenet121,
        "resnet18": resnet18,
        "resnet34": resnet34,
        "resnet50": resnet50,
    }
)


def _resnet(spec: ModelSpec, block: type[BasicBlock | Bottleneck], blocks: Sequence[int]) -> nn.Module:
    """Source: He et al., Deep Residual Learning, arXiv 1512.03385, table 1; 4.2 for the small stem."""
    model: nn.Module = ResNet(block, list(blocks), num_classes=spec.num_outputs, norm_layer=group_norm)
    model.conv1 = _stem(spec, 64)
    if _small(spec):
        model.maxpool = nn.Identity()
    side = spec.image_size if _small(spec) else -(-spec.image_size // 4)
    model.avgpool = nn.AvgPool2d(-(-side // 8))
    return _not_in_place(model)


def _small(spec: ModelSpec) -> bool:
    return spec.image_size < SMALL_IMAGE


def _stem(spec: ModelSpec, channels: int, *, kernel: int = 7) -> nn.Conv2d:
    """The first convolution: `kernel` wide with stride 2, or 3 x 3 without stride for small images."""
    kernel, stride = (3, 1) if _small(spec) else (kernel, 2)
    stem = nn.Conv2d(spec.channels, channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem


def _read_average(features: nn.Module, *, side: int, output: nn.Module) -> nn.Module:
    """`output` on the mean of each (side, side) map of `features`."""
    layers = OrderedDict(
        features=features, average=grid_pool(side, grid=1), flatten=nn.Flatten(), classifier=output
    )
    return _not_in_place(nn.Sequential(layers))


def _not_in_place(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.ReLU | nn.ReLU6):
            layer.inplace = False
    return model
