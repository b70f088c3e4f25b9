"""Weights that a server may send to make the last bits of a computation large.

`network_of_attacker`: the convolution is switched off, so all images look alike, and numbers of 1e8 cancel in
the last layer up to their rounding, which depends on the kernel: with 15 rows computed at once the network is
sure of one class, with 16 of the other. Without chunks of one shape, one patient more would turn the
gradients of all others.

`network_that_cancels`: two images of one patient have gradients of 1e12 that cancel up to the last bits of a
few numbers. A norm that is computed from products of factors, as of linear layers, then is rounding alone.

`network_that_is_sure`: the verdict on an image is right up to 1e-25, and as small are its gradients. Their
squares are below what a float32 holds, which matters where the server asks for as small a clip.

`network_of_equal_squares`: a layer of a quarter of a million numbers with gradients that are all equal, of a
size at which a sum of their squares in float32 is rounded down each time.
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


HUGE_FACTOR = 1e12
_HIDDEN = 512


def network_that_cancels(seed: int) -> nn.Module:
    """For `cancelling_patient`: its images light the first or the second of four pixels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        layers = [
            nn.Linear(4, _HIDDEN, bias=False),
            nn.Linear(_HIDDEN, 64, bias=False),
            nn.Linear(64, 2, bias=False),
        ]
    seen, between, last = (layer.weight.data for layer in layers)
    seen.zero_()
    seen[:, 0] = torch.randn(_HIDDEN, generator=generator)
    seen[:, 1] = seen[:, 0]
    seen[0, 1] = torch.nextafter(seen[0, 0], torch.tensor(torch.inf))
    between.zero_()  # so that the verdict is open on every image
    last[0] = HUGE_FACTOR * torch.randn(64, generator=generator)
    last[1] = -last[0]
    return nn.Sequential(nn.Flatten(), *layers)


def cancelling_patient() -> Examples:
    """One patient with two images 2 x 2, of either class, each with a lit pixel."""
    images = np.zeros((2, 1, 2, 2), dtype=np.uint8)
    images[0, 0, 0, 0] = images[1, 0, 0, 1] = 255
    return Examples(
        inputs={"image": images}, targets=np.arange(2), units=np.zeros(2, dtype=np.int64), unit_ids=("0",)
    )


def network_that_is_sure() -> nn.Module:
    """For patients of class 0, of whatever image."""
    with torch.random.fork_rng(devices=[]):
        norm, last = nn.LayerNorm(16), nn.Linear(16, 2)
    nn.init.zeros_(norm.weight)  # only the last bias has a gradient
    nn.init.zeros_(last.weight)
    last.bias.data[0], last.bias.data[1] = 57.0, 0.0
    return nn.Sequential(nn.Flatten(), norm, last)


EQUAL_SIDE = 512


def network_of_equal_squares() -> nn.Module:
    """For `half_lit_patient`: all gradients of the normalisation have one size, the worst of those tried."""
    count = EQUAL_SIDE**2
    with torch.random.fork_rng(devices=[]):
        norm, last = nn.LayerNorm(count, bias=False), nn.Linear(count, 2, bias=False)
    normalised = 0.5 / np.sqrt(0.25 + norm.eps)  # of numbers 0 and 1, as many of each

    def found_over_true(size: float) -> float:
        values = torch.full((1, count), float(size * normalised))
        return float(torch.linalg.vector_norm(values, dim=1)) / float(values[0, 0].double()) / EQUAL_SIDE

    worst = min(np.geomspace(0.5, 1.0, 60), key=found_over_true)
    nn.init.zeros_(norm.weight)
    last.weight.data[0], last.weight.data[1] = worst, -worst
    return nn.Sequential(nn.Flatten(), norm, last)


def half_lit_patient() -> Examples:
    """One patient with one image, half of it lit."""
    image = np.zeros((1, 1, EQUAL_SIDE, EQUAL_SIDE), dtype=np.uint8)
    image[..., : EQUAL_SIDE // 2] = 255
    return Examples(
        inputs={"image": image},
        targets=np.zeros(1, dtype=np.int64),
        units=np.zeros(1, dtype=np.int64),
        unit_ids=("0",),
    )


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
