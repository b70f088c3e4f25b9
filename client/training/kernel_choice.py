"""Which way the per-row gradients of a layer are computed: tried once for each shape, or a fixed table.

Tried with random numbers, so that the choice depends on shapes, machine and chance, never on patients or
weights. What is timed is all that the way changes: the gradients, their norms, their sum.
"""

import time
from threading import Lock

import torch
from torch import Tensor

from client.training.convolution_rows import Geometry, Way, possible_ways, weight_rows
from client.training.row_gradients import Units

_REPEATS = 3
_CLEARLY_FASTER = 0.9
_CHOSEN: dict[tuple[object, ...], Way] = {}
_CHOOSING = Lock()


def way_of(inputs: Tensor, gradient: Tensor, geometry: Geometry, *, fixed: bool) -> Way:
    """The way for these shapes; with `fixed` the same on every machine."""
    usual, *others = possible_ways(inputs, gradient, geometry)
    if fixed or not others:
        return usual
    key = (geometry, inputs.shape, gradient.shape, str(inputs.device), torch.get_num_threads())
    with _CHOOSING:  # one for all lanes: another way has other last bits
        if key not in _CHOSEN:
            _CHOSEN[key] = _fastest([usual, *others], inputs, gradient, geometry)
        return _CHOSEN[key]


@torch.no_grad()
def _fastest(ways: list[Way], inputs: Tensor, gradient: Tensor, geometry: Geometry) -> Way:
    generator = torch.Generator().manual_seed(0)

    def random_like(values: Tensor) -> Tensor:
        return torch.empty_like(values).copy_(torch.randn(values.shape, generator=generator))

    images, outputs = random_like(inputs), random_like(gradient)
    rows = len(images) // geometry.steps
    total = torch.zeros(geometry.out_channels * geometry.taps, dtype=torch.float64, device=inputs.device)
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
    units = Units.of(torch.arange(rows, device=inputs.device), rows, rows=rows)
    factors = torch.ones(rows, dtype=torch.float64, device=inputs.device)

    def seconds(way: Way) -> float:
        began = time.perf_counter()
        found = weight_rows(way, images, outputs, geometry)
        found.squared_norms(units)
        found.add_clipped(total.view(shape), factors, units, None)
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        return time.perf_counter() - began

    for way in ways:
        seconds(way)
    taken = {way: min(seconds(way) for _ in range(_REPEATS)) for way in ways}
    best = min(ways, key=lambda way: taken[way])
    return best if taken[best] < _CLEARLY_FASTER * taken[ways[0]] else ways[0]
