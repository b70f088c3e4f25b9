"""Layers whose backward pass leaves a gradient for each row, and no gradient summed over the rows.

While `with_row_gradients` lasts, every trainable layer computes the same outputs as before, and its backward
pass computes the gradient towards its inputs and, in place of the weights' gradient of the whole batch, which
nobody clipped and nobody needs, the `RowGradients` of each parameter, in its `grad_sample`. Maps are kept
with channels last, which the convolutions of CPUs and GPUs are fastest with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from client.training.convolution_rows import Geometry, pad, rows_at_a_time, weight_rows
from client.training.kernel_choice import way_of
from client.training.recurrence_rows import recurrence
from client.training.row_gradients import DenseRows, ProductRows, cut, keep, worth_products
from client.training.standardised_rows import kernels_of, of_weights
from common.models.over_steps import steps_by_layer
from common.models.private_layers import StandardisedConv2d
from common.models.recurrence import Recurrence

Context = Any
"""What autograd keeps between forward and backward; torch has no type for it."""


@contextmanager
def with_row_gradients(model: nn.Module, *, fixed_kernels: bool) -> Iterator[None]:
    """Give every trainable layer of `model` row gradients; it is plain again afterwards, errors or not.

    fixed_kernels: the same ways of computing on every machine, instead of those that are fastest on this one.
    """
    patched = []
    try:
        for layer, steps in steps_by_layer(model).items():
            if any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
                layer.forward = _forward_of(layer, steps, fixed_kernels)
                patched.append(layer)
        yield
    finally:
        for layer in patched:
            layer.__dict__.pop("forward", None)


def _forward_of(layer: nn.Module, steps: int, fixed: bool) -> Callable[..., Tensor]:
    """The forward pass of one of `client.training.guard.TRAINABLE_LAYERS`; raises TypeError for others.

    steps: consecutive inputs of the layer that are one record's; their gradients are added up.
    """
    if isinstance(layer, Recurrence) and steps == 1:
        return lambda inputs, real: recurrence(layer, inputs, real)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        geometry = Geometry.of(layer, steps=steps, formed=isinstance(layer, StandardisedConv2d))
        return lambda inputs: _Convolution.apply(inputs, layer.weight, layer.bias, layer, geometry, fixed)
    for kind, function in ((nn.Linear, _Linear), (nn.GroupNorm, _GroupNorm), (nn.LayerNorm, _LayerNorm)):
        if isinstance(layer, kind):
            return lambda inputs: function.apply(inputs, layer.weight, layer.bias, layer, steps)
    raise TypeError(f"{type(layer).__name__} has no row gradients")


def _channels_last(values: Tensor) -> Tensor:
    if values.dim() < 4:
        return values.contiguous()
    values = torch.movedim(values, 1, -1).contiguous()
    # Strides written anew: those of a single channel do not say which order is meant.
    return torch.movedim(values.view(values.shape), -1, 1) if values.shape[-1] > 1 else _one_channel(values)


def _in_order_of(values: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the memory order of the values it belongs to."""
    same = gradient.stride() == values.stride()
    return gradient if same else torch.empty_like(values).copy_(gradient)


def _one_channel(values: Tensor) -> Tensor:
    strides = [1]
    for length in reversed(values.shape[2:-1]):
        strides.append(strides[-1] * length)
    rows, *space = values.shape[:-1]
    row = strides[-1] * space[0]
    return values.as_strided((rows, 1, *space), (row, 1, *reversed(strides)))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: Any,
        geometry: Geometry,
        fixed: bool,
    ) -> Tensor:
        inputs, ordered = _channels_last(inputs), _channels_last(kernels_of(layer, weight.detach()))
        ctx.save_for_backward(inputs, ordered)
        ctx.layer, ctx.geometry, ctx.fixed = layer, geometry, fixed
        outputs: Tensor = layer._conv_forward(inputs, ordered, None if bias is None else bias.detach())
        return outputs

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inputs, weight), geometry = ctx.saved_tensors, ctx.geometry
        gradient = _channels_last(gradient)
        way = way_of(inputs, gradient, geometry, fixed=ctx.fixed)
        keep(ctx.layer.weight, lambda: of_weights(ctx.layer, weight_rows(way, inputs, gradient, geometry)))
        space = tuple(range(2, gradient.dim()))
        keep(ctx.layer.bias, lambda: DenseRows(gradient.sum(space)).merged(geometry.steps))
        towards = _towards_inputs(inputs, gradient, weight, geometry) if ctx.needs_input_grad[0] else None
        return towards, None, None, None, None, None


def _towards_inputs(inputs: Tensor, gradient: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    even = geometry.before == geometry.after
    padded = inputs if even else pad(inputs, geometry)
    dims = len(geometry.kernel)
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient,
        padded,
        weight,
        None,
        geometry.stride,
        geometry.before if even else [0] * dims,
        geometry.dilation,
        False,
        [0] * dims,
        geometry.groups,
        [True, False, False],
    )[0]
    if not even:
        for axis in range(dims):
            found = found.narrow(2 + axis, geometry.before[axis], inputs.shape[2 + axis])
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, inputs: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, steps: int
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight.detach())
        ctx.layer, ctx.steps = layer, steps
        return nn.functional.linear(inputs, weight.detach(), None if bias is None else bias.detach())

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        records = len(inputs) // ctx.steps
        left = gradient.reshape(records, -1, gradient.shape[-1])
        right = inputs.reshape(records, -1, inputs.shape[-1])

        def of_weight() -> DenseRows | ProductRows:
            positions = left.shape[1]
            if positions == 1 or worth_products(records=records, positions=positions, weights=weight.numel()):
                return ProductRows(left, right)
            return DenseRows(torch.bmm(left.mT, right).flatten(1))

        keep(ctx.layer.weight, of_weight)
        keep(ctx.layer.bias, lambda: DenseRows(left.sum(1)))
        return gradient.matmul(weight) if ctx.needs_input_grad[0] else None, None, None, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, inputs: Tensor, weight: Tensor, bias: Tensor, layer: Any, steps: int) -> Tensor:
        rows, channels = inputs.shape[:2]
        positions = inputs[0, 0].numel()
        outputs, mean, scale = torch.native_group_norm(
            inputs, weight.detach(), bias.detach(), rows, channels, positions, layer.num_groups, layer.eps
        )
        ctx.save_for_backward(inputs, weight.detach(), mean, scale)
        ctx.layer, ctx.steps = layer, steps
        return outputs

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, scale = ctx.saved_tensors
        gradient = _in_order_of(inputs, gradient)
        rows, channels = inputs.shape[:2]
        groups = ctx.layer.num_groups
        positions = inputs[0, 0].numel()
        # (rows, positions, channels), a view where channels are last in memory
        x, g = (
            torch.movedim(values, 1, -1).reshape(rows, positions, channels) for values in (inputs, gradient)
        )
        shifts, products = _sums_by_channel(x, g)

        def of_weight() -> DenseRows:
            by_group = (rows, groups, channels // groups)
            centred = products.view(by_group).addcmul_(mean.unsqueeze(2), shifts.view(by_group), value=-1)
            return DenseRows(centred.mul_(scale.unsqueeze(2)).view(rows, channels))

        keep(ctx.layer.weight, lambda: of_weight().merged(ctx.steps))
        keep(ctx.layer.bias, lambda: DenseRows(shifts).merged(ctx.steps))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        towards = torch.ops.aten.native_group_norm_backward(
            gradient, inputs, mean, scale, weight, rows, channels, positions, groups, [True, False, False]
        )[0]
        return towards, None, None, None, None


def _sums_by_channel(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over positions of g and of g * x, (rows, channels); few rows at a time, that stay in cache."""
    rows, _, channels = g.shape
    shifts, products = g.new_empty(rows, channels), g.new_empty(rows, channels)
    step = rows_at_a_time(rows, 12 * g[0].numel())
    for x_here, g_here, shift, product in zip(
        *(cut(values, step) for values in (x, g, shifts, products)), strict=True
    ):
        torch.sum(g_here, 1, out=shift)
        torch.sum(g_here * x_here, 1, out=product)
    return shifts, products


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, inputs: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, steps: int
    ) -> Tensor:
        outputs, mean, scale = torch.native_layer_norm(
            inputs,
            layer.normalized_shape,
            weight.detach(),
            None if bias is None else bias.detach(),
            layer.eps,
        )
        ctx.save_for_backward(inputs, weight.detach(), mean, scale)
        ctx.layer, ctx.steps = layer, steps
        return outputs

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, scale = ctx.saved_tensors
        layer, records = ctx.layer, len(inputs) // ctx.steps
        width = weight.numel()
        gradient = gradient.contiguous()
        keep(
            layer.weight,
            lambda: DenseRows(((inputs - mean) * scale * gradient).reshape(records, -1, width).sum(1)),
        )
        keep(layer.bias, lambda: DenseRows(gradient.reshape(records, -1, width).sum(1)))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        towards = torch.ops.aten.native_layer_norm_backward(
            gradient, inputs, layer.normalized_shape, mean, scale, weight, layer.bias, [True, False, False]
        )[0]
        return towards, None, None, None, None
