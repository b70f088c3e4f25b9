"""Row gradients of a recurrence: per record, a product over its steps, as of a linear layer over positions.

The weights between the states enter every step as (state before) * weight. With d_t the gradient towards that
product at step t, a record's gradient of the weights is sum_t d_t^T state_t: `ProductRows` with steps for
positions. Towards padding d_t is exactly zero. Source: Werbos, Backpropagation Through Time, 1990.
"""

from typing import Any

import torch
from torch import Tensor

from client.training.row_gradients import DenseRows, ProductRows, keep, worth_products
from common.models.recurrence import Recurrence, last_state


def recurrence(layer: Recurrence, inputs: Tensor, real: Tensor) -> Tensor:
    """What `layer` puts out; its backward pass leaves row gradients in place of the weights' own."""
    found: Tensor = _Recurrence.apply(inputs, real, layer.weight, layer.bias, layer)
    return found


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, real: Tensor, weight: Tensor, bias: Tensor | None, layer: Recurrence
    ) -> Tensor:
        fixed = None if bias is None else bias.detach()
        with torch.enable_grad():  # a graph of its own, in which the weights are constants
            inputs = inputs.detach().requires_grad_()
            added = torch.zeros_like(inputs).requires_grad_()
            last, before = last_state(layer.kind, inputs, real, weight.detach(), fixed, added=added)
        ctx.layer, ctx.graph = layer, (inputs, added, last)
        ctx.before = torch.stack([state.detach() for state in before], dim=1)
        return last.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layer, (inputs, added, last), before = ctx.layer, ctx.graph, ctx.before
        towards, left = torch.autograd.grad(last, (inputs, added), gradient)

        def of_weight() -> DenseRows | ProductRows:
            rows, steps = left.shape[:2]
            if worth_products(records=rows, positions=steps, weights=layer.weight.numel()):
                return ProductRows(left, before)
            return DenseRows(torch.bmm(left.mT, before).flatten(1))

        keep(layer.weight, of_weight)
        keep(layer.bias, lambda: DenseRows(left[..., -layer.units :].sum(1)))
        return towards, None, None, None, None
