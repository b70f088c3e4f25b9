"""Sums over units of clipped gradients while a step collects them, over chunks and over lanes.

A parameter's sum is float64 in its `summed_grad`. What makes it cheap: small parameters are added up as if
they were one; factors of large ones wait and are multiplied together, so that a large sum is gone through
seldom; memory of sums is used again in the next step. `settle` brings everything to its `summed_grad`.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor

from client.training.row_gradients import (
    DenseRows,
    ProductRows,
    RowGradients,
    Units,
    add_product,
    cut,
    together,
)
from common.errors import GuardError
from common.privacy.noise import MOST_POSITIONS

_SMALL = 4096
"""Parameters of at most so many numbers are worked on together."""
LARGE = 2**17
"""Of so many numbers: the sum is gone through once for several chunks, its memory not kept between steps."""
_MOST_PENDING = 2**11
"""Rows times positions that wait for it."""


class ClippedSums:
    """The sums of one optimiser's parameters, and of copies that share their weights (other lanes')."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        self._parameters = parameters
        self._pending: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._joined: dict[int, tuple[list[Any], Tensor]] = {}
        self._copies: dict[int, list[Any]] = {id(parameter): [] for parameter in parameters}
        self._zeroed: dict[int, Tensor] = {}

    def include(self, parameters: Sequence[Any]) -> None:
        """Remember that the sums of these, in order, belong to ours; GuardError if weights are not shared."""
        for own, other in zip(self._parameters, parameters, strict=True):
            if other is own or any(other is known for known in self._copies[id(own)]):
                continue
            if other.data_ptr() != own.data_ptr():
                raise GuardError("a copy of the network has other weights", fix="let it share them")
            self._copies[id(own)].append(other)
            other.summed_grad = None

    def add(
        self,
        gradients: Mapping[Any, RowGradients],
        factors: Tensor,
        units: Units,
        broken: Tensor | None,
        joined: DenseRows | None,
    ) -> None:
        """Add the gradients of each slot times its factor, as `RowGradients.add_clipped`.

        gradients: by parameter, all of one copy. joined: of the small ones of them, as `small_together`.
        """
        if joined is not None:
            self._add_small(
                [p for p, rows in gradients.items() if is_joined(rows)], joined, factors, units, broken
            )
        for parameter, rows in gradients.items():
            if not is_joined(rows):
                self._add_large(parameter, rows, factors, units, broken)

    def _add_small(
        self, parameters: list[Any], rows: DenseRows, factors: Tensor, units: Units, broken: Tensor | None
    ) -> None:
        known, total = self._joined.pop(id(parameters[0]), ([], None))
        if total is None or list(map(id, known)) != list(map(id, parameters)):
            if total is not None:
                self._part(known, total)
            total = rows.zeros()
        rows.add_clipped(total, factors, units, broken)
        self._joined[id(parameters[0])] = (parameters, total)

    def _part(self, parameters: list[Any], total: Tensor) -> None:
        """Give each of the small parameters that were added up together its own."""
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, own in zip(parameters, cut(total, sizes), strict=True):
            self._summed(parameter).add_(own.view_as(parameter))

    def _add_large(
        self, parameter: Any, rows: RowGradients, factors: Tensor, units: Units, broken: Tensor | None
    ) -> None:
        if not isinstance(rows, ProductRows) or parameter.numel() < LARGE:
            rows.add_clipped(self._summed(parameter), factors, units, broken)
            return
        pending = self._pending.setdefault(id(parameter), [])
        pending.append(rows.clipped_factors(factors, units, broken))
        if sum(len(left) for left, _ in pending) >= _MOST_PENDING:
            self._multiply([self._pending.pop(id(parameter))], into=parameter)

    def _summed(self, parameter: Any) -> Tensor:
        """The sum so far, float64, zeros at first."""
        if parameter.summed_grad is None:
            zeros = self._zeroed.pop(id(parameter), None)
            if zeros is None:
                zeros = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
            parameter.summed_grad = zeros
        return torch.as_tensor(parameter.summed_grad)

    def _multiply(self, pending: list[list[tuple[Tensor, Tensor]]], *, into: Any) -> None:
        """Add the products of all these factors, as many terms at a time as rounding is paid for."""
        several: list[tuple[Tensor, Tensor]] = []
        for factors in (*chain.from_iterable(pending), None):
            terms = sum(len(left) for left, _ in several)
            if several and (factors is None or terms + len(factors[0]) > MOST_POSITIONS):
                lefts, rights = zip(*several, strict=True)
                add_product(self._summed(into), torch.cat(lefts), rights)
                several = []
            several += [] if factors is None else [factors]

    def settle(self) -> None:
        """Bring everything that is in no `summed_grad` of ours yet into it."""
        for parameters, total in self._joined.values():
            self._part(parameters, total)
        self._joined.clear()
        for parameter in self._parameters:
            copies = self._copies[id(parameter)]
            self._multiply([self._pending.pop(id(one), []) for one in (parameter, *copies)], into=parameter)
            for copy in copies:
                if copy.summed_grad is not None:
                    self._summed(parameter).add_(copy.summed_grad)
                    self._clear(copy)

    def clear(self) -> None:
        """Forget the sums; to be called when they were released."""
        for parameter in self._parameters:
            if parameter.summed_grad is not None:
                self._clear(parameter)

    @property
    def are_waiting(self) -> bool:
        """Whether gradients of a chunk are still to be added, in any of the copies."""
        everybody = chain(self._parameters, *self._copies.values())
        return any(getattr(parameter, "grad_sample", None) is not None for parameter in everybody)

    def forget(self) -> None:
        """Forget everything, also what is half-finished."""
        self._pending.clear()
        self._joined.clear()
        for parameter in chain(self._parameters, *self._copies.values()):
            parameter.grad = parameter.grad_sample = parameter.summed_grad = None

    def _clear(self, parameter: Any) -> None:
        if parameter.numel() < LARGE:  # what chunks compute needs the room of large ones
            self._zeroed[id(parameter)] = parameter.summed_grad.zero_()
        parameter.summed_grad = None


def small_together(gradients: Mapping[Any, RowGradients]) -> DenseRows | None:
    """Gradients of all small parameters as if of one: otherwise there is more to call than to compute."""
    small = [rows for rows in gradients.values() if is_joined(rows)]
    return together(small) if small else None


def is_joined(gradients: RowGradients) -> TypeGuard[DenseRows]:
    """Whether `small_together` has them."""
    return isinstance(gradients, DenseRows) and gradients.in_order and gradients.width <= _SMALL
