"""Whether a network treats records apart, tried with random ones: no record may show in another's place."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.errors import GuardError
from common.models.over_steps import steps_by_layer
from common.models.series import with_real_steps

_PROBED_RECORDS = 3


def own(layer: nn.Module) -> list[nn.Parameter]:
    """Parameters of the layer itself, not of those in it."""
    return list(layer.parameters(recurse=False))


def trains(layer: nn.Module) -> bool:
    """Whether the layer has weights of its own that are trained."""
    return any(parameter.requires_grad for parameter in own(layer))


def named(name: str, layer: nn.Module) -> str:
    """A layer's name for a message."""
    return f"{name or 'the model itself'} ({type(layer).__name__})"


def probe_records(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Run on random records: they must not influence each other, every trainable layer must run once.

    Also within the network: what a layer gets in a record's place must be that record's, or the gradient that
    is clipped for it would be another's. Raises GuardError.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    records = torch.randn(_PROBED_RECORDS, *input_shape, generator=generator)
    changed = records.clone()
    changed[-1] = 50 * torch.randn(input_shape, generator=generator)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    layers = {name: layer for name, layer in model.named_modules() if trains(layer)}
    with torch.no_grad():
        before, seen_before = _run(model, layers, with_real_steps(model, records).to(device))
        after, seen_after = _run(model, layers, with_real_steps(model, changed).to(device))
    misused = [f"{name} ({len(seen_before[name])} times)" for name in layers if len(seen_before[name]) != 1]
    if misused:
        raise GuardError(
            f"these layers do not run exactly once in a forward: {', '.join(misused)}",
            why="their per-row gradient would be missing or arrive in parts",
            fix="use every trainable layer once",
        )
    moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    if moved:
        raise GuardError(
            f"these buffers change when the model runs: {', '.join(moved)}",
            why="they would store private data that is neither clipped nor noised",
            fix="use layers without running statistics",
        )
    if not _are_apart(before, after, steps=1):
        raise GuardError(
            "the model's output for one record depends on another record of the batch",
            why="clipping one record's gradient then does not bound its influence (trap T4)",
            fix="use layers that treat every record alone, for example GroupNorm",
        )
    steps = steps_by_layer(model)
    mixed = [
        named(name, layer)
        for name, layer in layers.items()
        if not _are_apart(*seen_before[name], *seen_after[name], steps=steps[layer])
    ]
    if mixed:
        raise GuardError(
            f"these layers do not get each record's inputs in its own place: {', '.join(mixed)}",
            why="what is taken for one record's gradient would hold another's",
            fix="keep records in their order, one input each, and those of a series within OverSteps",
        )


def _run(
    model: nn.Module, layers: dict[str, nn.Module], records: Tensor
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Outputs, and what each of the layers got, by name."""
    seen: defaultdict[str, list[Tensor]] = defaultdict(list)

    def noting(name: str) -> Callable[..., None]:
        return lambda _layer, inputs: seen[name].append(inputs[0])

    handles = [layer.register_forward_pre_hook(noting(name)) for name, layer in layers.items()]
    try:
        return model(records), seen
    finally:
        for handle in handles:
            handle.remove()


def _are_apart(before: Tensor, after: Tensor, *, steps: int) -> bool:
    """Whether there are so many values for each record, and only those of the last one changed."""
    others = (_PROBED_RECORDS - 1) * steps
    rows = len(before) == len(after) == _PROBED_RECORDS * steps
    return rows and torch.allclose(before[:others], after[:others], rtol=1e-5, atol=1e-6)
