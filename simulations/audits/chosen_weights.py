"""Weights that a server may send to make the last bits of a computation large.

The convolution is switched off, so all images look alike, and numbers of 1e8 cancel in the last layer up to
their rounding, which depends on the kernel: with 15 rows computed at once the network is sure of one class,
with 16 of the other. Without chunks of one shape, one patient more would turn the gradients of all others.
"""

import numpy as np
import torch
from torch import nn

from common.config import ModelSpec
from common.examples import Examples
from common.models.registry import build_model

SIZE = 28
FEW, MORE = 15, 16
"""Patients between which the usual kernels change."""
_HUGE = 1e8


def network_of_attacker() -> tuple[nn.Module, bool]:
    """The network, and whether its verdict does turn between FEW and MORE rows on this machine."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(ModelSpec(name="cnn1", channels=1, image_size=SIZE, num_outputs=2)).eval()
    named = dict(model.named_parameters())
    if "norm1.bias" not in named:  # another network than is installed
        return model, False
    weight, bias = named["output.weight"], named["output.bias"]
    images = torch.zeros(MORE, 1, SIZE, SIZE)
    with torch.no_grad():
        named["norm1.weight"].zero_()
        named["norm1.bias"].fill_(1.0)
        for seed in range(50):
            generator = torch.Generator().manual_seed(seed)
            weight.zero_()
            bias.zero_()
            weight[1] = _HUGE * torch.randn(weight.shape[1], generator=generator)
            for _ in range(30):
                few, more = model(images[:FEW])[0, 1], model(images)[0, 1]
                if few * more < 0:
                    return model, True
                bias[1] -= (few + more) / 2
    return model, False


def patients(count: int) -> Examples:
    """Patients with one random film each, of both classes in turn."""
    images = np.random.default_rng(5).integers(0, 256, (8 * MORE, 1, SIZE, SIZE), dtype=np.uint8)
    numbers = np.arange(count)
    return Examples(
        inputs={"image": images[:count]},
        targets=numbers % 2,
        units=numbers,
        unit_ids=tuple(str(number) for number in numbers),
    )
