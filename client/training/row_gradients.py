"""Gradients of single rows, held in the form that is cheapest to clip: their norms, and their clipped sum.

A layer puts what it knows about its rows' gradients of one parameter into `DenseRows` (the gradients
themselves) or `ProductRows` (their factors, from which norm and sum follow without them). Both answer the two
questions of clipping: the squared norm of each unit's gradient, its rows added up first, and the sum of the
units' gradients, each times its factor.

Guarantee of both, whatever the other rows and units are, for gradients of at most 1e18: the norm is at least
the true one over 1 + CLIP_SLACK, and a unit that is clipped with it to C moves the sum, formed in float64, by
at most C(1 + CLIP_SLACK) plus what rounding in float64 does (`common.privacy.noise`). All shapes are those of
the chunk, so that no kernel is chosen by how many patients are in it.

Sources: for a linear layer with one position the norm is that of the factors, Goodfellow, Efficient
per-example gradient computations, arXiv 1510.01799; for several positions from Gram matrices, Bu et al.,
arXiv 2205.10683, section 3; the sum from the factors, Bu et al., arXiv 2210.00038.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from common.privacy.noise import LARGEST_COHERENCE, MOST_POSITIONS

_SUMMED_IN_FLOAT32 = 128
_BLOCK_VALUES = 2**17
"""Float64 values that are worked on at once: they stay in a core's cache."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """Which rows of a chunk belong together: as many slots for units as the chunk has rows."""

    slots: Tensor
    """int64 (rows,), slot of each row, never decreasing; rows that only fill the chunk up share the last."""
    num_units: int
    """Slots in use: 0..num_units-1."""
    alone: bool
    """Whether row i is all of unit i."""
    most_rows: int
    """Rows of the unit that has most."""

    @classmethod
    def of(cls, segments: Tensor, num_units: int, *, rows: int) -> "Units":
        """Units of int64 (own rows,) `segments` in a chunk of `rows`; ValueError for impossible ones."""
        counts = torch.bincount(segments, minlength=max(num_units, 1))
        if num_units < 1 or len(counts) != num_units or len(segments) > rows or int(counts.min()) < 1:
            raise ValueError(
                "segments must be 0..num_units-1, each at least once, and not more than the rows"
            )
        if not bool((segments.diff() >= 0).all()):
            raise ValueError("segments must never decrease")
        slots = segments.new_full((rows,), rows - 1)
        slots[: len(segments)] = segments
        most = int(counts.max())
        return cls(slots=slots, num_units=num_units, alone=most == 1, most_rows=most)


class RowGradients(Protocol):
    """Gradients of one parameter, one for each row of a chunk."""

    @property
    def rows(self) -> int:
        """Rows of the chunk, those that fill it up included."""

    def squared_norms(self, units: Units) -> Tensor:
        """Squared norm of each slot's gradient, float64 (rows,); see the module for its slack."""

    def add_clipped(self, total: Tensor, factors: Tensor, units: Units, broken: Tensor | None) -> None:
        """Add the gradient of each slot times its factor to float64 `total`, shaped as the parameter.

        factors: float64 (rows,), by slot. broken: bool (rows,), slots that count as zero whatever they hold;
        None where there are none.
        """

    def contents(self) -> Tensor:
        """Everything that norms and sums follow from, (rows, anything)."""

    def merged(self, steps: int) -> "RowGradients":
        """Of rows / steps records: so many consecutive rows each, their gradients added up."""


class DenseRows:
    """The gradients themselves, float32 (rows, n); `arrange` brings n numbers into the parameter's order."""

    def __init__(self, values: Tensor, *, arrange: Callable[[Tensor], Tensor] | None = None) -> None:
        self._values = values
        self._arrange = arrange
        self._added_up = False

    @property
    def rows(self) -> int:
        """Rows of the chunk."""
        return len(self._values)

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self._values.shape[1]

    @property
    def in_order(self) -> bool:
        """Whether the numbers are in the parameter's order."""
        return self._arrange is None

    def ordered(self) -> Tensor:
        """The gradients with numbers in the parameter's order."""
        if self._arrange is None:
            return self._values
        order = self._arrange(torch.arange(self.width, device=self._values.device))
        return self._values.index_select(1, order.reshape(-1))

    def zeros(self) -> Tensor:
        """A sum of nobody, float64 (n,)."""
        return torch.zeros(self.width, dtype=torch.float64, device=self._values.device)

    def contents(self) -> Tensor:
        """The gradients."""
        return self._values

    def merged(self, steps: int) -> "DenseRows":
        """Of records with so many rows each."""
        if steps == 1:
            return self
        return DenseRows(self._values.view(-1, steps, self.width).sum(1), arrange=self._arrange)

    def squared_norms(self, units: Units) -> Tensor:
        """Squared norm of each slot's gradient, float64 (rows,)."""
        return squared_norms(self._by_slot(units))

    def add_clipped(self, total: Tensor, factors: Tensor, units: Units, broken: Tensor | None) -> None:
        """Add the gradient of each slot times its factor to float64 `total`."""
        values = self._by_slot(units)
        if broken is not None:
            values[broken] = 0  # their factor is 0, but 0 * nan is nan
        if self._arrange is None and total.is_contiguous():
            weighted_sum(values, factors, into=total.view(-1))
        else:
            zeros = torch.zeros_like(total, memory_format=torch.contiguous_format).view(-1)
            found = weighted_sum(values, factors, into=zeros)
            total += found.view_as(total) if self._arrange is None else self._arrange(found)

    def _by_slot(self, units: Units) -> Tensor:
        # Never a product with an indicator matrix: 0 * nan would spread one row over all units.
        if not units.alone and not self._added_up:
            self._values = torch.zeros_like(self._values).index_add_(0, units.slots, self._values)
            self._added_up = True
        return self._values


class ProductRows:
    """Gradients as products: row i has sum_t left[i, t] right[i, t]^T, from (rows, t, p) and (rows, t, d).

    Both float32; the parameter has p * d numbers, p first. Positions and rows of a unit may cancel in the
    product, and rounding with what they cancel from. So such norms are formed in float64 and count as at
    least a share 1 / LARGEST_COHERENCE of the sum of the norms of all single products: then the factors that
    are added up exceed C by no more than LARGEST_COHERENCE either.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right

    @property
    def rows(self) -> int:
        """Rows of the chunk."""
        return len(self._left)

    def contents(self) -> Tensor:
        """Both factors, one after the other."""
        return torch.cat([self._left.flatten(1), self._right.flatten(1)], dim=1)

    def merged(self, steps: int) -> "ProductRows":
        """Of records with so many rows each: all their positions are those of the record."""
        if steps == 1:
            return self
        positions = steps * self._left.shape[1]
        left, right = (factor.reshape(-1, positions, factor.shape[2]) for factor in (self._left, self._right))
        return ProductRows(left, right)

    def squared_norms(self, units: Units) -> Tensor:
        """Squared norm of each slot's gradient, float64 (rows,)."""
        left, right = self._left.double(), self._right.double()
        if units.alone and left.shape[1] == 1:  # by the same formula as below, whoever else has several rows
            norms = left.square().sum((1, 2)) * right.square().sum((1, 2))
            return norms + (norms.sqrt() / LARGEST_COHERENCE).square_()
        squared = left.new_zeros(len(left))
        for apart in range(units.most_rows):  # row i with row i + apart, where both belong to one unit
            first = slice(0, len(left) - apart)
            gram = torch.bmm(left[first], left[apart:].mT).mul_(torch.bmm(right[first], right[apart:].mT))
            together = units.slots[first] == units.slots[apart:]
            products = torch.where(together, gram.sum((1, 2)), torch.zeros_like(squared[first]))
            squared.index_add_(0, units.slots[first], products if apart == 0 else 2 * products)
        singly = (left.square().sum(2) * right.square().sum(2)).sqrt_().sum(1)
        singly = torch.zeros_like(singly).index_add_(0, units.slots, singly)
        return squared.clamp_(min=0) + (singly / LARGEST_COHERENCE).square_()

    def clipped_factors(self, factors: Tensor, units: Units, broken: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both factors of the clipped gradients, (rows * t, p) in float64 and (rows * t, d) in float32."""
        left, right = self._left.double(), self._right
        if broken is not None:  # their factor is 0, but 0 * nan is nan
            rows = broken[units.slots]
            left[rows], right = 0, right.masked_fill(rows[:, None, None], 0)
        left *= factors[units.slots][:, None, None]
        return left.flatten(0, 1), right.flatten(0, 1)

    def add_clipped(self, total: Tensor, factors: Tensor, units: Units, broken: Tensor | None) -> None:
        """Add the gradient of each slot times its factor to float64 `total`."""
        left, right = self.clipped_factors(factors, units, broken)
        add_product(total, left, [right])


def worth_products(*, records: int, positions: int, weights: int) -> bool:
    """Whether products of so many positions are better left unformed, and as many as rounding is paid for."""
    return 4 * positions**2 <= weights and records * positions <= MOST_POSITIONS


def keep(parameter: Any, rows: Callable[[], RowGradients]) -> None:
    """Put row gradients into a parameter's `grad_sample`; only where it is trained are they formed."""
    if parameter is not None and parameter.requires_grad:
        earlier = getattr(parameter, "grad_sample", None)
        # A second gradient for the same rows: neither is the row's, and the optimiser refuses what is here.
        parameter.grad_sample = rows() if earlier is None else [earlier, "more"]


def add_product(total: Tensor, left: Tensor, rights: Sequence[Tensor]) -> None:
    """Add left^T right, float64 (n, p) and float32 (n, d) in parts, to float64 `total` of p * d numbers."""
    whole = total.view(left.shape[1], -1)
    columns = min(whole.shape[1], max(1, _BLOCK_VALUES // len(left)))
    block = total.new_empty(len(left), columns)
    for start in range(0, whole.shape[1], columns):
        here = whole[:, start : start + columns]
        right = block[:, : here.shape[1]]
        torch.cat([some[:, start : start + columns].double() for some in rights], out=right)
        here.addmm_(left.T, right)


def squared_norms(values: Tensor) -> Tensor:
    """Squared l2 norm of each row of float32 (rows, n), float64 (rows,).

    Squares are added in float32 over at most 128 numbers, which is off by at most 128 * 2**-24 of the sum,
    and in float64 beyond. A plain float32 norm would be off by up to 2e-3 over millions of weights.
    """
    whole = values.shape[1] // _SUMMED_IN_FLOAT32 * _SUMMED_IN_FLOAT32
    blocks = values[:, :whole].view(len(values), whole // _SUMMED_IN_FLOAT32, _SUMMED_IN_FLOAT32)
    squared: Tensor = torch.linalg.vector_norm(blocks, dim=2).double().square_().sum(1)
    rest: Tensor = torch.linalg.vector_norm(values[:, whole:], dim=1).double().square_()
    return squared + rest


def weighted_sum(values: Tensor, factors: Tensor, *, into: Tensor) -> Tensor:
    """Add float32 (rows, n) `values`, each row times its float64 factor, to float64 (n,) `into`."""
    columns = min(len(into), max(1, _BLOCK_VALUES // len(values)))
    block = into.new_empty(len(values), columns)
    for part, here in zip(cut(into, columns), cut(values, columns, 1), strict=True):
        part.addmv_(block[:, : len(part)].copy_(here).T, factors)
    return into


def cut(values: Tensor, lengths: int | Sequence[int], dim: int = 0) -> Sequence[Tensor]:
    """Views of stretches of `values`, as torch.split."""
    stretches: Sequence[Tensor] = values.split(lengths, dim)  # type: ignore[no-untyped-call]
    return stretches


def together(parts: Sequence[DenseRows]) -> DenseRows:
    """Several parameters' gradients as if of one; cheaper where they are small."""
    return DenseRows(torch.cat([part.contents() for part in parts], dim=1))
