"""A recurrent layer over short series that treats every record alone: tanh-RNN, GRU and LSTM.

What comes in is already multiplied by the input weights (a linear layer over all steps at once); this layer
has the weights between a state and the next. It computes what torch.nn.RNN, GRU and LSTM compute, which
cannot be used under differential privacy: the gradient of a single record cannot be had from them.

Sources: Hochreiter and Schmidhuber, Long Short-Term Memory, 1997; Cho et al., arXiv 1406.1078; the order and
the formulas of the gates are those of torch.nn.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["rnn", "gru", "lstm"]
States = tuple[Tensor, ...]
"""What is carried over, (rows, units) each; the first of them is what the layer puts out."""


class Recurrence(nn.Module):
    """From (rows, steps, gates * units) to the state after the last real step, (rows, units)."""

    def __init__(self, kind: Kind, units: int) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.units = units
        self.weight = nn.Parameter(torch.empty(GATES[kind] * units, units))
        # A bias within the reset of the GRU's candidate; elsewhere the input weights' bias does the same.
        self.bias = nn.Parameter(torch.empty(units)) if kind == "gru" else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(units**-0.5), units**-0.5)

    def extra_repr(self) -> str:
        """Part of the architecture's printed form."""
        return f"kind={self.kind}, units={self.units}"

    def forward(self, inputs: Tensor, real: Tensor) -> Tensor:
        """Run over the steps; `real` is bool (rows, steps), and a step that is not real changes no state."""
        return last_state(self.kind, inputs, real, self.weight, self.bias)[0]


def last_state(
    kind: Kind,
    inputs: Tensor,
    real: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    added: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The state after the last real step, (rows, units), and the states before each of the steps.

    added: what is added to each product of state and weight, (rows, steps, gates * units); none for zeros.
    """
    cell, units = _CELLS[kind], weight.shape[1]
    states: States = (inputs.new_zeros(len(inputs), units),) * (2 if kind == "lstm" else 1)
    before = []
    more = (None,) * inputs.shape[1] if added is None else added.unbind(1)
    for here, is_real, extra in zip(inputs.unbind(1), real.unsqueeze(2).unbind(1), more, strict=True):
        before.append(states[0])
        product = torch.mm(states[0], weight.T) if extra is None else torch.addmm(extra, states[0], weight.T)
        after = cell(here, product, bias, states)
        states = tuple(torch.where(is_real, new, old) for new, old in zip(after, states, strict=True))
    return states[0], before


def _rnn(inputs: Tensor, product: Tensor, _bias: Tensor | None, _states: States) -> States:
    return (torch.tanh(inputs + product),)


def _gru(inputs: Tensor, product: Tensor, bias: Tensor | None, states: States) -> States:
    units = states[0].shape[1]
    reset, update = torch.sigmoid(inputs[:, : 2 * units] + product[:, : 2 * units]).chunk(2, 1)
    candidate = product[:, 2 * units :] if bias is None else product[:, 2 * units :] + bias
    new = torch.tanh(inputs[:, 2 * units :] + reset * candidate)
    return (new + update * (states[0] - new),)


def _lstm(inputs: Tensor, product: Tensor, _bias: Tensor | None, states: States) -> States:
    take, keep, new, show = (inputs + product).chunk(4, 1)
    cell = torch.sigmoid(keep) * states[1] + torch.sigmoid(take) * torch.tanh(new)
    return torch.sigmoid(show) * torch.tanh(cell), cell


GATES: Mapping[Kind, int] = MappingProxyType({"rnn": 1, "gru": 3, "lstm": 4})
"""Numbers that come in per unit; GRU: reset, update, candidate; LSTM: input, forget, cell, output gate."""
_CELLS: Mapping[Kind, Callable[[Tensor, Tensor, Tensor | None, States], States]] = MappingProxyType(
    {"rnn": _rnn, "gru": _gru, "lstm": _lstm}
)
