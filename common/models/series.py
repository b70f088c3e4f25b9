"""Models of series of images: what a network sees in each image, and what a recurrence makes of the order.

A series is one float32 tensor (rows, steps, features), features = channels * image_size**2 + 2: the image's
preprocessed pixels, `present` (1 for a real step, 0 for padding, which comes last) and the years since the
step before (0 for the first). `steps` is the plan's longest series, public. What a padded step holds reaches
neither output nor gradient, not even where it is not finite; a series without a step is one of state zero.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from common.config import ModelSpec
from common.models.convolutional import read_on_grid, small_trunk
from common.models.over_steps import OverSteps
from common.models.private_layers import activation
from common.models.recurrence import GATES, Kind, Recurrence
from common.series_form import TIME_FEATURES

WIDTH = 32
"""Numbers that the encoder says of an image, and units of the recurrence."""


def encoder(spec: ModelSpec) -> nn.Sequential:
    """`cnn-small` with WIDTH numbers in place of its head: (rows, channels, ...) to (rows, WIDTH)."""
    layers = OrderedDict(read_on_grid(small_trunk(spec), grid=3, outputs=WIDTH).named_children())
    layers["embedding"] = layers.pop("output")
    layers["activation"] = activation(spec.activation)
    return nn.Sequential(layers)


class RecurrentModel(nn.Module):
    """All images through one encoder, a recurrence over what it says, a head on the last state."""

    takes_series = True

    def __init__(self, spec: ModelSpec, kind: Kind) -> None:
        super().__init__()
        self._image = (spec.channels, spec.image_size, spec.image_size)
        self.encoder = OverSteps(spec.steps, encoder(spec))
        self.gates = nn.Linear(WIDTH + 1, GATES[kind] * WIDTH)
        self.recurrence = Recurrence(kind, WIDTH)
        self.output = nn.Linear(WIDTH, spec.num_outputs)
        if kind == "lstm":
            # Remember at first. Source: Jozefowicz et al., An Empirical Exploration of RNNs, 2015.
            nn.init.ones_(self.gates.bias[WIDTH : 2 * WIDTH])

    def forward(self, series: Tensor) -> Tensor:
        """Map (rows, steps, features) to (rows, num_outputs)."""
        pixels, real, years = parted(series)
        seen = self.encoder(pixels.reshape(*real.shape, *self._image))
        # The gap's logarithm: years and weeks then differ by what the weights can tell, not by hundreds.
        gap = torch.log1p(years.clamp(min=0))
        outputs: Tensor = self.output(self.recurrence(self.gates(torch.cat([seen, gap], dim=2)), real))
        return outputs


class LastImageModel(nn.Module):
    """The same encoder and head on the last real step alone: what a series must beat."""

    takes_series = True

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self._image = (spec.channels, spec.image_size, spec.image_size)
        self.encoder = encoder(spec)
        self.output = nn.Linear(WIDTH, spec.num_outputs)

    def forward(self, series: Tensor) -> Tensor:
        """Map (rows, steps, features) to (rows, num_outputs)."""
        pixels, real, _ = parted(series)
        numbers = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, numbers, 0).amax(1)
        newest = pixels.gather(1, last[:, None, None].expand(-1, 1, pixels.shape[2]))
        outputs: Tensor = self.output(self.encoder(newest.reshape(-1, *self._image)))
        return outputs


def parted(series: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (rows, steps, n), whether a step is real, bool (rows, steps), and years (rows, steps, 1).

    Padding is zero in both whatever it held: zero times something not finite would not be. A step that does
    not say which it is (nan) is taken for real, so that a broken record is seen as one.
    """
    real = ~(series[:, :, -2] < 0.5)
    padding = ~real.unsqueeze(2)
    return (
        series[:, :, :-TIME_FEATURES].masked_fill(padding, 0),
        real,
        series[:, :, -1:].masked_fill(padding, 0),
    )


def with_real_steps(model: nn.Module, made_up: Tensor) -> Tensor:
    """`made_up` inputs; for a model of series with real steps: all in row 0, one less in each row after it.

    Random numbers in place of `present` would leave most of a network untried. Other models' inputs stay.
    """
    if not getattr(model, "takes_series", False):
        return made_up
    rows, steps = made_up.shape[:2]
    lengths = steps - torch.arange(rows, device=made_up.device) % steps
    series = made_up.clone()
    series[:, :, -2] = (torch.arange(steps, device=made_up.device) < lengths[:, None]).to(made_up.dtype)
    return series


BUILDERS: Mapping[str, Callable[[ModelSpec], nn.Module]] = MappingProxyType(
    {
        "rnn": partial(RecurrentModel, kind="rnn"),
        "gru": partial(RecurrentModel, kind="gru"),
        "lstm": partial(RecurrentModel, kind="lstm"),
        "last-image": LastImageModel,
    }
)
