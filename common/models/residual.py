"""ResNet-18 with GroupNorm (imports torchvision, which takes a second: the registry loads it on demand)."""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from common.config import ModelSpec
from common.models.private_layers import group_norm


class _PrivateBlock(BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """A block of torchvision without its in-place sum, which backward hooks on the norm layer forbid."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (rows, channels, height, width) to the block's output."""
        shortcut = x if self.downsample is None else self.downsample(x)
        hidden = self.relu(self.bn1(self.conv1(x)))
        out: torch.Tensor = self.relu(self.bn2(self.conv2(hidden)) + shortcut)
        return out


def resnet18(spec: ModelSpec) -> nn.Module:
    """ResNet-18 of torchvision with GroupNorm; always ReLU, whatever `spec.activation` says.

    Residual sums of bounded activations would saturate. Below 64 px the first convolution is 3 x 3 without
    stride or max-pooling, as usual for small images: the standard stem would leave a map of one pixel.
    Source: He et al., Deep Residual Learning, arXiv 1512.03385, section 4.2 for the small stem.
    """
    model: nn.Module = ResNet(
        _PrivateBlock, [2, 2, 2, 2], num_classes=spec.num_outputs, norm_layer=group_norm
    )
    small = spec.image_size < 64
    kernel, stride = (3, 1) if small else (7, 2)
    model.conv1 = nn.Conv2d(spec.channels, 64, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small:
        model.maxpool = nn.Identity()
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    # Averaging everything left is what adaptive pooling to 1 x 1 does, with a deterministic gradient on CUDA.
    side = spec.image_size if small else -(-spec.image_size // 4)
    model.avgpool = nn.AvgPool2d(-(-side // 8))
    return model
