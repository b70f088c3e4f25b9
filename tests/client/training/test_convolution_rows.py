"""Every way to a convolution's weight gradients against float64 autograd, one row and one unit at a time."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from client.training import per_row_layers
from client.training.batches import filled
from client.training.convolution_rows import WAYS, Geometry, possible_ways, weight_rows
from client.training.per_row_layers import _channels_last
from client.training.private import accumulate_clipped_gradients, per_row_gradients
from client.training.row_gradients import Units
from tests.client.training.dp_oracle import (
    TASK,
    accumulate_all,
    make_dp_optimizer,
    make_plan,
    oracle_clipped_sum,
    random_rows,
    relative_error,
    summed,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

ROWS = 3
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SPACES = {1: (11,), 2: (9, 8), 3: (5, 6, 7)}


def geometries():
    """(dims, in, out, kernel, stride, padding, dilation, groups) that torch accepts."""
    found = []
    paddings = {1: [0, 2, "same", "valid"], 2: [0, (2, 1), "same", "valid"], 3: [0, (1, 0, 2), "same"]}
    kernels = {1: [1, 3, 4], 2: [1, 3, (4, 3), (2, 5)], 3: [(1, 2, 3), 3]}
    strides = {1: [1, 2, 3], 2: [1, (2, 3)], 3: [1, (2, 1, 3)]}
    dilations = {1: [1, 2], 2: [1, (2, 1)], 3: [1]}
    channels = [(1, 4, 1), (6, 4, 2), (4, 8, 4), (6, 3, 1)]  # the third one is depthwise
    for dims in KINDS:
        for number, numbers in enumerate(
            itertools.product(kernels[dims], strides[dims], paddings[dims], dilations[dims])
        ):
            kernel, stride, padding, dilation = numbers
            if padding == "same" and stride != 1:
                continue
            # Every channel layout with every kernel, but not with everything else.
            for channel in (channels[number % 4], channels[(number + 1) % 4]):
                found.append((dims, *channel, kernel, stride, padding, dilation))
    return found


def layer_of(dims, in_channels, out_channels, groups, kernel, stride, padding, dilation):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KINDS[dims](
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )


def rows_by_autograd(layer, inputs, gradient):
    """float64 (rows, *weights), each row alone."""
    exact = copy.deepcopy(layer).double()
    rows = [
        torch.autograd.grad(exact(inputs[[row]].double()), exact.weight, gradient[[row]].double())[0]
        for row in range(len(inputs))
    ]
    return torch.stack(rows)


def terms(rows, row):
    """Norms of the single products of a row, added up."""
    return float((rows._left[row].norm(dim=1) * rows._right[row].norm(dim=1)).sum())


def row_of(rows, row, shape):
    units = Units.of(torch.arange(ROWS), ROWS, rows=ROWS)
    total = torch.zeros(shape, dtype=torch.float64)
    rows.add_clipped(total, torch.eye(ROWS, dtype=torch.float64)[row], units, None)
    return total


def fits(way, numbers):
    """Products are for one group, bands for two dimensions and more besides, without a stride down."""
    dims, *_, groups, kernel, stride = numbers[:6]
    high, step = (size[0] if isinstance(size, tuple) else size for size in (kernel, stride))
    if way == "bands":
        return groups == 1 and dims > 1 and high > 1 and step == 1
    return way != "product" or groups == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dims", KINDS)
def test_every_way_gives_each_rows_gradient(way, dims):
    tried = 0
    for numbers in geometries():
        if numbers[0] != dims or not fits(way, numbers):
            continue
        layer = layer_of(*numbers)
        inputs = torch.randn(ROWS, numbers[1], *SPACES[dims], generator=torch.Generator().manual_seed(1))
        outputs = layer(inputs)
        gradient = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
        expected = rows_by_autograd(layer, inputs, gradient)
        for arrange in (_channels_last, torch.Tensor.contiguous):
            rows = weight_rows(way, arrange(inputs), arrange(gradient), Geometry.of(layer))
            assert rows.rows == ROWS
            norms = rows.squared_norms(Units.of(torch.arange(ROWS), ROWS, rows=ROWS)).sqrt()
            for row in range(ROWS):
                error = relative_error(row_of(rows, row, layer.weight.shape), expected[row])
                assert error < 1e-5, (numbers, row, error)
                true = float(expected[row].norm())
                # Products count as at least a share of their terms; see `ProductRows`.
                most = true * (1 + 1e-5) if way != "product" else math.hypot(true, terms(rows, row) / 2048)
                assert true * (1 - 1e-5) <= float(norms[row]) <= most * (1 + 1e-5)
        tried += 1
    assert tried >= (5 if way != "bands" else 4 * (dims > 1))


def exact_clipped_sum(model, inputs, targets, units, clip):
    return oracle_clipped_sum(copy.deepcopy(model).double(), inputs.double(), targets, units, clip=clip)


def network_of(*numbers):
    layer = layer_of(*numbers)
    shape = (numbers[1], *SPACES[numbers[0]])
    width = layer(torch.zeros(1, *shape)).numel()
    # A convolution before it, so that its gradient towards the inputs counts as well.
    before = KINDS[numbers[0]](numbers[1], numbers[1], 3, padding=1)
    return nn.Sequential(before, nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 2)), shape


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("numbers", geometries()[::11], ids=str)
def test_clipped_sums_of_ragged_units_in_filled_chunks(monkeypatch, way, numbers):
    if not fits(way, numbers):
        return
    monkeypatch.setattr(per_row_layers, "way_of", lambda *_, fixed: way)
    model, shape = network_of(*numbers)
    segments = np.repeat(np.arange(3), [1, 3, 2])
    inputs, targets = random_rows(segments, shape=shape)
    for clip in (0.1, 1e3):
        expected = exact_clipped_sum(model, inputs, targets, segments, clip)
        with per_row_gradients(model) as wrapped:
            optimizer = make_dp_optimizer(model, make_plan(l2_clip_norm=clip))
            accumulate_clipped_gradients(
                wrapped,
                TASK,
                optimizer,
                inputs=filled(inputs, 8),
                targets=filled(targets, 8),
                segments=torch.from_numpy(segments),
                num_units=3,
            )
            optimizer.settle()
            # A product of 400 positions may count as larger by that much.
            assert relative_error(summed(model), expected) < (1e-5 if way != "product" else 4e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("units", [[0], [0, 0, 0], [0, 1, 2, 3]], ids=str)
def test_one_row_one_unit_and_rows_alone(monkeypatch, way, units):
    monkeypatch.setattr(per_row_layers, "way_of", lambda *_, fixed: way)
    model, shape = network_of(2, 2, 3, 1, 3, 1 if way == "bands" else 2, 1, 1)
    inputs, targets = random_rows(units, shape=shape)
    expected = exact_clipped_sum(model, inputs, targets, units, 0.3)
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan(l2_clip_norm=0.3))
        accumulate_all(wrapped, optimizer, inputs, targets, units, max_rows=2)
        assert relative_error(summed(model), expected) < 1e-5


def test_the_ways_that_are_tried_fit_their_shapes():
    def ways(layer, inputs, rows=64):
        inputs = torch.zeros(rows, *inputs)
        return possible_ways(inputs, layer(inputs), Geometry.of(layer))

    assert ways(nn.Conv2d(1, 32, 3), (1, 28, 28)) == ("taps",)
    assert ways(nn.Conv2d(64, 64, 3), (64, 12, 12))[0] == "bands"
    assert ways(nn.Conv2d(64, 64, 3, stride=2), (64, 40, 40))[0] == "positions"
    assert ways(nn.Conv2d(64, 64, 1), (64, 12, 12))[0] == "positions"
    assert "product" in ways(nn.Conv2d(256, 256, 3, padding=1), (256, 4, 4))
    # Not where so many terms are added to a number that the bound on rounding does not hold.
    assert "product" not in ways(nn.Conv2d(256, 256, 3, padding=1), (256, 4, 4), rows=2048)
    assert "product" not in ways(nn.Conv2d(256, 256, 3, padding=1, groups=2), (256, 4, 4))
