"""Whether the place of a row among those computed with it changes its bits, tried with random numbers.

Where it did, one patient more or less would shift the places of others and with them their last bits, which
a server that picks the weights can make large. Kernels are chosen by shapes, threads and machine, not by
values: random weights and images, the same every time, tell, and neither the patients nor the weights of the
run are looked at. So no weights can be sent that hide a difference from the trial.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from common.tasks import Task

_FOUND: dict[tuple[object, ...], bool] = {}


def place_matters(
    model: nn.Module,
    *,
    input_shape: tuple[int, ...],
    rows: int,
    scored_for: Task | None = None,
    fixed_kernels: bool = True,
) -> bool:
    """Whether a row's bits depend on its place among `rows`: those of its gradient.

    With `scored_for` those of its probabilities. Tried once in a process for each architecture, shape, device
    and number of threads.
    """
    device = next(model.parameters()).device
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    key = (repr(model), scored_for, input_shape, rows, str(device), threads, deterministic, fixed_kernels)
    if key not in _FOUND:
        _FOUND[key] = _tried(copy.deepcopy(model), input_shape, rows, scored_for, fixed_kernels)
    return _FOUND[key]


def _tried(
    model: nn.Module,
    input_shape: tuple[int, ...],
    rows: int,
    scored_for: Task | None,
    fixed_kernels: bool,
) -> bool:
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    inputs = torch.randn((rows, *input_shape), generator=generator).to(device)
    targets = torch.randint(2, (rows,), generator=generator).to(device)

    def compute(shift: int) -> Tensor:
        moved = inputs.roll(shift, 0)
        if scored_for is None:
            return _gradients(model, moved, targets.roll(shift, 0), fixed_kernels).roll(-shift, 0)
        with torch.no_grad():
            return torch.as_tensor(scored_for.probabilities(model(moved))).roll(-shift, 0)

    expected = compute(0)
    shifts = {1, rows // 2 + 1} & set(range(1, rows))
    return not all(torch.equal(compute(shift), expected) for shift in shifts)


def _gradients(model: nn.Module, inputs: Tensor, targets: Tensor, fixed_kernels: bool) -> Tensor:
    """Row gradients of all parameters, or what they follow from, (rows, anything)."""
    from client.training.private import per_row_gradients

    with per_row_gradients(model, fixed_kernels=fixed_kernels) as wrapped:
        outputs = wrapped(inputs)
        if outputs.shape[1] == 1:  # an entropy of one class is 0 whatever it is
            outputs = torch.cat([outputs, torch.zeros_like(outputs)], dim=1)
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        losses.sum().backward()  # type: ignore[no-untyped-call]
        parameters: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.cat([parameter.grad_sample.contents() for parameter in parameters], dim=1)
