"""Private gradients of series: a patient's gradient over all series and steps, against plain autograd."""

import numpy as np
import pytest
import torch
from torch import nn

from client.training.batches import bytes_per_row, filled
from client.training.guard import guard_model
from client.training.per_row_layers import with_row_gradients
from client.training.private import accumulate_clipped_gradients, per_row_gradients
from client.training.row_gradients import ProductRows
from client.training.row_places import place_matters
from common.config import ModelSpec
from common.errors import GuardError
from common.models.over_steps import OverSteps
from common.models.recurrence import GATES, Recurrence
from common.models.registry import build_model
from tests.client.training.dp_oracle import (
    TASK,
    clipped_sum,
    make_dp_optimizer,
    make_plan,
    oracle_clipped_sum,
    random_rows,
    relative_error,
    summed,
)
from tests.model_names import OF_SERIES

SIZE, STEPS, ROWS = 17, 4, 32
FEATURES = SIZE**2 + 2
RAGGED = np.repeat(np.arange(6), [1, 4, 2, 1, 3, 2])


def build(name, *, steps=STEPS, scale=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(ModelSpec(name=name, channels=1, image_size=SIZE, num_outputs=2, steps=steps))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def series(rows, *, steps=STEPS, seed=0):
    """Random series of 1 to `steps` steps, and targets."""
    inputs, targets = random_rows(range(rows), seed=seed, shape=(steps, FEATURES))
    lengths = torch.randint(1, steps + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    inputs[..., -2] = (torch.arange(steps) < lengths[:, None]).float()
    inputs[..., -1] = inputs[..., -1].abs()
    return inputs, targets


@pytest.mark.parametrize("name", OF_SERIES)
@pytest.mark.parametrize("max_rows", [1, 3, 100])
@pytest.mark.parametrize("clip", [1e-2, 0.5, 1e3])
def test_clipped_sum_is_that_of_one_patient_at_a_time(name, max_rows, clip):
    model, (inputs, targets) = build(name), series(len(RAGGED))
    expected = oracle_clipped_sum(model, inputs, targets, RAGGED, clip=clip)
    found = clipped_sum(model, inputs, targets, RAGGED, clip=clip, max_rows=max_rows)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_each_weight_has_its_gradient(name):
    model, (inputs, targets) = build(name, steps=7), series(1, steps=7, seed=3)
    expected = oracle_clipped_sum(model, inputs, targets, [0], clip=1e6)
    found = clipped_sum(model, inputs, targets, [0], clip=1e6)
    sizes = [parameter.numel() for parameter in model.parameters()]
    for one, other in zip(found.split(sizes), expected.split(sizes), strict=True):
        assert relative_error(one, other) < 2e-5


@pytest.mark.parametrize("as_product", [False, True])
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_the_recurrence_alone_with_and_without_products(monkeypatch, kind, as_product):
    for module in ("recurrence_rows", "per_row_layers"):
        monkeypatch.setattr(f"client.training.{module}.worth_products", lambda **_: as_product)

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.gates = nn.Linear(3, 5 * GATES[kind])
            self.recurrence = Recurrence(kind, 5)
            self.output = nn.Linear(5, 2)

        def forward(self, inputs):
            return self.output(self.recurrence(self.gates(inputs), inputs[..., 0] > -0.3))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small()
    guard_model(model, input_shape=(6, 3))
    inputs, targets = random_rows(RAGGED, shape=(6, 3))
    for clip in (0.1, 1e3):
        expected = oracle_clipped_sum(model, inputs, targets, RAGGED, clip=clip)
        assert relative_error(clipped_sum(model, inputs, targets, RAGGED, clip=clip), expected) < 1e-5
    with with_row_gradients(model, fixed_kernels=True):
        model(inputs).sum().backward()
    assert isinstance(model.recurrence.weight.grad_sample, ProductRows) is as_product
    assert model.recurrence.weight.grad is None


LAYERS = [
    (nn.Conv2d(1, 4, 3, stride=2, padding=1), (1, 7, 7)),
    (nn.Conv2d(8, 4, 3, padding=1), (8, 4, 4)),
    (nn.Conv2d(32, 48, 3, padding=1), (32, 2, 1)),  # few positions: its gradient is left as a product
    (nn.Conv2d(4, 6, (3, 2), groups=2), (4, 6, 5)),
    (nn.Conv1d(2, 3, 3, padding=1), (2, 9)),
    (nn.Linear(5, 4), (5,)),
    (nn.Linear(5, 4), (3, 5)),
    (nn.GroupNorm(2, 4), (4, 3, 3)),
    (nn.LayerNorm([3, 4]), (2, 3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
def test_every_allowed_layer_over_steps_has_the_gradient_of_plain_autograd(layer, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = layer(torch.zeros(1, *shape)).numel()
        inner = nn.Sequential(nn.Unflatten(1, shape), layer, nn.Tanh(), nn.Flatten())
        model = nn.Sequential(OverSteps(3, inner), nn.Flatten(), nn.Linear(3 * width, 2))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    flat = (3, int(np.prod(shape)))
    guard_model(model, input_shape=flat)
    units = [0, 0, 1, 2, 2, 2]
    inputs, targets = random_rows(units, shape=flat)
    for clip in (0.1, 1e3):
        expected = oracle_clipped_sum(model, inputs, targets, units, clip=clip)
        assert relative_error(clipped_sum(model, inputs, targets, units, clip=clip), expected) < 1e-5


def contribution(model, inputs, targets, segments):
    """Clipped sum of one chunk that is filled up to ROWS."""
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan())
        accumulate_clipped_gradients(
            wrapped,
            TASK,
            optimizer,
            inputs=filled(inputs, ROWS),
            targets=filled(targets, ROWS),
            segments=torch.tensor(segments),
            num_units=max(segments) + 1,
        )
        optimizer.settle()
        return summed(model)


@pytest.mark.parametrize("name", OF_SERIES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_patient_of_two_series_adds_the_same_bits_in_any_company_at_any_place(name, scale):
    model = build(name, scale=scale)
    if place_matters(model, input_shape=(STEPS, FEATURES), rows=ROWS):
        pytest.skip("the place matters on this machine: patients are computed alone")
    inputs, targets = series(ROWS)
    alone = contribution(model, inputs[:2], targets[:2], [0, 0])
    for others, first in ((14, 14), (30, 0), (30, 13)):
        company = contribution(model, inputs[2 : 2 + others], targets[2 : 2 + others], list(range(others)))
        order = [*range(2, 2 + first), 0, 1, *range(2 + first, 2 + others)]
        segments = [*range(first), first, first, *range(first + 1, others + 1)]
        both = contribution(model, inputs[order], targets[order], segments)
        assert float((both - company - alone).norm()) <= 1e-13 * (others + 1)


@pytest.mark.parametrize("name", OF_SERIES)
def test_the_place_in_a_chunk_does_not_matter_for_the_models_of_the_registry(name):
    assert not place_matters(build(name), input_shape=(STEPS, FEATURES), rows=ROWS)


@pytest.mark.parametrize("name", OF_SERIES)
def test_a_broken_series_touches_nobody_else(name):
    model, (inputs, targets) = build(name), series(3)
    expected = clipped_sum(model, inputs[:2], targets[:2], [0, 1])
    last = int(inputs[2, :, -2].sum()) - 1
    for where in ((2, last, 5), (2, last), (2,)):
        broken = inputs.clone()
        broken[where] = float("nan")
        assert relative_error(clipped_sum(model, broken, targets, [0, 1, 2]), expected) < 1e-6


@pytest.mark.parametrize("name", OF_SERIES)
def test_what_padding_holds_reaches_no_private_gradient(name):
    model, (inputs, targets) = build(name), series(5)
    expected = clipped_sum(model, inputs, targets, range(5), clip=1e3)
    padding = inputs[..., -2] == 0
    assert padding.any()
    for held in (1e30, float("inf"), float("nan")):
        changed = inputs.clone()
        changed[padding] = held
        changed[..., -2] = inputs[..., -2]
        assert torch.equal(clipped_sum(model, changed, targets, range(5), clip=1e3), expected)


class InWrongOrder(nn.Module):
    """Steps first: every record's outputs are right, and its gradient would be another's."""

    def __init__(self):
        super().__init__()
        self.over = OverSteps(STEPS, nn.Linear(3, 2))

    def forward(self, inputs):
        mixed = self.over.layers(inputs.transpose(0, 1).flatten(0, 1))
        return mixed.unflatten(0, (STEPS, -1)).mean(0)


class Turned(nn.Module):
    """Hands the records to a layer in another order, and back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs):
        return self.layer(inputs.roll(1, 0)).roll(-1, 0).mean(1)


class WithoutOverSteps(nn.Module):
    """A layer that sees more rows than there are records."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs):
        return self.layer(inputs.flatten(0, 1)).unflatten(0, (-1, STEPS)).mean(1)


@pytest.mark.parametrize(
    ("model", "name"),
    [(InWrongOrder(), "over.layers"), (Turned(), "layer"), (WithoutOverSteps(), "layer")],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_get_records_in_another_order_are_refused(model, name):
    with pytest.raises(GuardError, match=rf"own place: {name} \(Linear\)"):
        guard_model(model, input_shape=(STEPS, 3))


class OwnRecurrence(Recurrence):
    """Might compute anything."""


def test_subclasses_second_uses_and_recurrences_over_steps_are_refused():
    class Model(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, inputs):
            return self.layer(inputs, inputs[..., 0] > 0)

    class Twice(Model):
        def forward(self, inputs):
            return super().forward(inputs) + super().forward(-inputs)

    guard_model(Model(Recurrence("gru", 2)), input_shape=(3, 6))
    with pytest.raises(GuardError, match="per-row gradient: layer .OwnRecurrence"):
        guard_model(Model(OwnRecurrence("gru", 2)), input_shape=(3, 6))
    with pytest.raises(GuardError, match="exactly once .*layer .2 times"):
        guard_model(Twice(Recurrence("gru", 2)), input_shape=(3, 6))
    with (
        pytest.raises(TypeError, match="Recurrence has no row gradients"),
        with_row_gradients(OverSteps(2, Recurrence("rnn", 2)), fixed_kernels=True),
    ):
        pass


def test_longer_series_take_more_memory():
    short, long = (bytes_per_row(build("gru", steps=n), (n, FEATURES)) for n in (2, 8))
    assert 3 < long / short < 4.5
