"""Refuses set-ups that keep running but void differential privacy or the gradient.

The traps of Opacus 1.6 that run on silently, and what meets each of them here:

T1   ghost adaptive clipping does not clip           `guard_optimizer`: our layers and optimiser only
T2   a scheduler changes C or sigma on one side      PatientDPOptimizer reads the frozen plan only
T3   ghost mode with an unwrapped loss               `guard_optimizer`: our layers clip whatever the loss
T4   BatchNorm, also frozen or without parameters    `guard_model`: by type, and by a probe of the model
T5   a loss that couples records                     `guard_losses`: by a probe of the task
T6   regularisers added to the loss                  Task.losses sees no weights; decay needs no gradient
T7   a batch left half-way enters the next release   `guard_optimizer`: clean start; no BatchMemoryManager
T8   one non-finite record                           PatientDPOptimizer: counts as zero
T9   an empty batch replaced by a random record      our own sampler; an empty batch releases noise alone
T10  padding other than zeros                        `guard_model`: by layer
T11  the private batch size in a divisor             PatientDPOptimizer: q * n of the plan, always
T12  noise from torch's global generator             PatientDPOptimizer: noise from RandomnessSource only

Beyond them: Conv and Linear subclasses (Opacus treats them as something else), tied and reused layers,
layers in evaluation mode or in place, dropout (global generator), buffers that change, weights in
channels-last order (Opacus unfolds what follows wrongly), modules wrapped twice.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleNoOp
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import SGD, Adam, RMSprop

from client.training.adam_bc import AdamBC, noise_variance
from client.training.patient_optimizer import PatientDPOptimizer
from common.errors import GuardError
from common.models.private_layers import refuse_batch_norm
from common.privacy.plan import PrivacyPlan
from common.tasks import Task

TRAINABLE_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.GroupNorm, nn.LayerNorm)
"""Exact types whose per-row gradients are checked against plain autograd in our tests."""
OPTIMIZERS = (SGD, Adam, RMSprop, AdamBC)
"""Exact types that see nothing but the noised gradient, public numbers and their own past."""


@dataclass(frozen=True)
class _Rule:
    what: str
    breaks: Callable[[nn.Module], bool]
    why: str
    fix: str


def _own(layer: nn.Module) -> list[nn.Parameter]:
    return list(layer.parameters(recurse=False))


def _trains(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in _own(layer))


_RULES = (
    _Rule(
        "the model is already prepared for per-row gradients",
        lambda layer: (
            isinstance(layer, GradSampleModule | GradSampleModuleNoOp)
            or hasattr(layer, "autograd_grad_sample_hooks")
            or "forward" in layer.__dict__
        ),
        "hooks added twice would count every gradient twice",
        "pass the plain model",
    ),
    _Rule(
        "these layers have no verified per-row gradient",
        lambda layer: _trains(layer) and type(layer) not in TRAINABLE_LAYERS,
        "Opacus goes by the exact type; a subclass or unknown layer silently takes another path",
        f"use exactly {', '.join(layer.__name__ for layer in TRAINABLE_LAYERS)}",
    ),
    _Rule(
        "these convolutions do not pad with zeros",
        lambda layer: getattr(layer, "padding_mode", "zeros") != "zeros",
        "Opacus computes their gradient as if they did (trap T10)",
        "use padding_mode='zeros'",
    ),
    _Rule(
        "these layers work in place",
        lambda layer: bool(getattr(layer, "inplace", False)),
        "they overwrite what the hooks of the layer before them need",
        "use inplace=False",
    ),
    _Rule(
        "these layers draw from torch's global random generator",
        lambda layer: isinstance(layer, _DropoutNd | nn.RReLU),
        "its seed may be known or shared between hospitals",
        "leave them out; the noise already regularises",
    ),
    _Rule(
        "these layers are in evaluation mode",
        lambda layer: not layer.training,
        "Opacus takes no per-row gradients there",
        "call model.train()",
    ),
    _Rule(
        "these trainable layers have buffers",
        lambda layer: _trains(layer) and any(True for _ in layer.buffers(recurse=False)),
        "a buffer can store private data and is neither clipped nor noised",
        "use a layer without buffers",
    ),
    _Rule(
        "these layers have weights in channels-last order",
        lambda layer: any(not parameter.is_contiguous() for parameter in _own(layer)),
        "Opacus unfolds the activations that follow from it wrongly",
        "call model.to(memory_format=torch.contiguous_format)",
    ),
)


def guard_model(model: nn.Module, *, input_shape: tuple[int, ...]) -> None:
    """Raise GuardError or BatchNormError, naming layers, unless every row of a batch is treated alone.

    Looks at the layers, then runs `model` twice on three random rows of `input_shape`. Depends on no patient.
    """
    refuse_batch_norm(model)
    for rule in _RULES:
        broken = [_named(name, layer) for name, layer in model.named_modules() if rule.breaks(layer)]
        if broken:
            raise GuardError(f"{rule.what}: {', '.join(broken)}", why=rule.why, fix=rule.fix)
    _refuse_shared_parameters(model)
    _probe_model(model, input_shape)


_MOST_PROBED_ROWS = 16


def guard_losses(task: Task) -> None:
    """Raise GuardError unless `task.losses` gives one loss per record that no other record changes.

    Guarantee: checked on random outputs, one record changed at a time (trap T5). Depends on no patient.
    """
    generator = torch.Generator().manual_seed(0)
    rows = min(task.num_outputs + 2, _MOST_PROBED_ROWS)
    outputs = torch.randn(rows, task.num_outputs, generator=generator)
    shape = (rows, *task.target_shape)
    targets = torch.arange(math.prod(shape)).reshape(shape) % task.target_values
    losses = task.losses(outputs, targets)
    if losses.shape != (rows,):
        raise GuardError(
            f"the losses of {rows} records have shape {tuple(losses.shape)}, expected ({rows},)",
            why="a mean or weighted mean over the batch lets one record rescale all others (trap T5)",
            fix="return one loss per record (reduction='none')",
        )
    for changed in range(rows):
        others = torch.arange(rows) != changed
        new_outputs, new_targets = outputs.clone(), targets.clone()
        new_outputs[changed] = 10 * torch.randn(task.num_outputs, generator=generator)
        new_targets[changed] = (targets[changed] + 1) % task.target_values
        if not torch.allclose(task.losses(new_outputs, new_targets)[others], losses[others]):
            raise GuardError(
                "the loss of a record depends on other records of the batch",
                why="clipping one record's gradient then does not bound its influence (trap T5)",
                fix="compute each loss from its own record; weight classes by public constants",
            )


def guard_optimizer(optimizer: Any, model: Any, plan: PrivacyPlan) -> None:
    """Raise GuardError unless `optimizer` clips and noises exactly `model` by `plan`, from a clean start.

    model: the wrapped one. Meets T1, T2, T3 and T7.
    """
    wrapped: Any = getattr(optimizer, "original_optimizer", None)
    own = {id(p) for group in getattr(wrapped, "param_groups", ()) for p in group["params"]}
    variance = noise_variance(plan)
    checks = (
        (
            type(model) is GradSampleModuleNoOp and model.loss_reduction == "sum" and model.batch_first,
            "the model does not give our per-row gradients of a summed loss",
        ),
        (
            all("forward" in layer.__dict__ for layer in getattr(model, "modules", list)() if _trains(layer)),
            "layers of the model compute their gradients summed over the rows",
        ),
        (
            type(optimizer) is PatientDPOptimizer,
            f"{type(optimizer).__name__} does not clip patients",
        ),
        (getattr(optimizer, "plan", None) == plan, "the optimiser works with other numbers than the plan"),
        (
            type(wrapped) in OPTIMIZERS and all(not g["weight_decay"] for g in wrapped.param_groups),
            "the wrapped optimiser is not plain SGD, Adam, RMSprop or AdamBC without weight decay",
        ),
        (
            all(g.get("noise_variance", variance) == variance for g in getattr(wrapped, "param_groups", ())),
            "the wrapped optimiser takes off other noise than the plan's",
        ),
        (
            own == {id(parameter) for parameter in model.parameters() if parameter.requires_grad},
            "the optimiser does not hold exactly the model's trainable parameters",
        ),
        (
            not getattr(wrapped, "state", None) and getattr(optimizer, "steps_taken", 0) == 0,
            "the optimiser has state from an earlier round",
        ),
        (
            not getattr(optimizer, "_step_skip_queue", None)
            and all(getattr(p, name, None) is None for p in model.parameters() for name in _LEFTOVERS),
            "gradients or skipped steps of an earlier batch are left over",
        ),
    )
    for holds, what in checks:
        if not holds:
            raise GuardError(what, why="the guarantee would not hold", fix="use client.training.private")


_LEFTOVERS = ("summed_grad", "grad_sample")


def _named(name: str, layer: nn.Module) -> str:
    return f"{name or 'the model itself'} ({type(layer).__name__})"


def _refuse_shared_parameters(model: nn.Module) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = [" = ".join(same) for same in names.values() if len(same) > 1]
    if shared:
        raise GuardError(
            f"these parameters are shared: {', '.join(shared)}",
            why="their gradient arrives in parts, and clipping the parts is not clipping the whole",
            fix="give every layer parameters of its own",
        )


def _probe_model(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Run on random rows: rows must not influence each other, every trainable layer must run once."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, *input_shape, generator=generator)
    changed = rows.clone()
    changed[2] = 50 * torch.randn(input_shape, generator=generator)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    calls: Counter[str] = Counter()

    def counter(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    layers = {name: layer for name, layer in model.named_modules() if _trains(layer)}
    handles = [layer.register_forward_hook(counter(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            before: Tensor = model(rows.to(device))
            uses = dict(calls)
            after: Tensor = model(changed.to(device))
    finally:
        for handle in handles:
            handle.remove()
    misused = [f"{name} ({uses.get(name, 0)} times)" for name in layers if uses.get(name, 0) != 1]
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
    if len(before) != 3 or not torch.allclose(before[:2], after[:2], rtol=1e-5, atol=1e-6):
        raise GuardError(
            "the model's output for one record depends on another record of the batch",
            why="clipping one record's gradient then does not bound its influence (trap T4)",
            fix="use layers that treat every record alone, for example GroupNorm",
        )
