"""Examples: what a hospital trains and scores on, as one table of rows that belong to units (patients)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray


class UnitRows(NamedTuple):
    """Which rows belong to which unit, compressed: unit u owns `rows[offsets[u]:offsets[u + 1]]`."""

    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]

    def of(self, unit: int) -> NDArray[np.int64]:
        """Rows of one unit in table order."""
        return self.rows[self.offsets[unit] : self.offsets[unit + 1]]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Examples:
    """A table of examples; an Example is one row: its named inputs, its target, its unit.

    Raises ValueError when the columns do not fit together. The printed form shows counts only.
    """

    inputs: Mapping[str, NDArray[Any]]
    """Named inputs; `image` is uint8 (rows, channels, height, width), maybe memory-mapped and read-only."""
    targets: NDArray[np.int64]
    """int64 (rows,): class or level; (rows, classes) of 0 and 1 where a record has several findings."""
    units: NDArray[np.int64]
    """int64 (rows,) in 0..num_units-1: the unit (patient) of each row."""
    unit_ids: tuple[str, ...]
    """(num_units,) private: never leaves the hospital."""

    def __post_init__(self) -> None:
        rows = len(self.targets)
        if self.targets.ndim not in (1, 2) or self.units.shape != (rows,):
            raise ValueError(
                f"targets {self.targets.shape} must be (rows,) or (rows, classes), units {self.units.shape} "
                "(rows,)"
            )
        for name, values in self.inputs.items():
            if len(values) != rows:
                raise ValueError(f"input {name} has {len(values)} rows, targets have {rows}")
        if rows and (self.units.min() < 0 or self.units.max() >= len(self.unit_ids)):
            raise ValueError(f"units must lie in 0..{len(self.unit_ids) - 1}")

    def __repr__(self) -> str:
        return f"Examples(rows={self.num_rows}, units={self.num_units}, inputs={sorted(self.inputs)})"

    @property
    def num_rows(self) -> int:
        """Images (private: never leaves the hospital)."""
        return len(self.targets)

    @property
    def num_units(self) -> int:
        """Patients (private: never leaves the hospital)."""
        return len(self.unit_ids)

    @cached_property
    def unit_rows(self) -> UnitRows:
        """Index from unit to rows, built once."""
        counts = np.bincount(self.units, minlength=self.num_units)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return UnitRows(offsets, np.argsort(self.units, kind="stable").astype(np.int64))

    def rows_of_units(self) -> list[NDArray[np.int64]]:
        """One array of rows per unit; `unit_rows` is the quick form."""
        offsets, rows = self.unit_rows
        return np.split(rows, offsets[1:-1]) if self.num_units else []

    def select_units(self, units: Sequence[int] | NDArray[np.integer[Any]]) -> Self:
        """All rows of these units, unit by unit in the given order and renumbered 0, 1, ... in that order.

        `units` afterwards never decreases. Rows that lie together stay a view of the same memory.
        Raises ValueError when a unit is named twice or does not exist.
        """
        chosen = np.asarray(units, dtype=np.int64)
        if len(np.unique(chosen)) != len(chosen):
            raise ValueError("a unit is selected twice")
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= self.num_units):
            raise ValueError(f"units must lie in 0..{self.num_units - 1}")
        offsets, rows = self.unit_rows
        counts = offsets[chosen + 1] - offsets[chosen]
        # Row j of the result is the (j - start of its unit)-th row of that unit.
        starts = np.repeat(offsets[chosen] - (np.cumsum(counts) - counts), counts)
        picked = rows[starts + np.arange(int(counts.sum()))]
        return type(self)(
            inputs={name: take_rows(values, picked) for name, values in self.inputs.items()},
            targets=self.targets[picked],
            units=np.repeat(np.arange(len(chosen), dtype=np.int64), counts),
            unit_ids=tuple(self.unit_ids[unit] for unit in chosen),
        )


def take_rows(values: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """`values[rows]`, as a view without copying where the rows follow each other."""
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return values[rows[0] : rows[0] + len(rows)]
    return values[rows]


def concatenate(tables: Sequence[Examples]) -> Examples:
    """One table of all rows in order; units with the same id become one unit.

    Raises ValueError for no tables or tables whose inputs have other names.
    """
    if not tables:
        raise ValueError("nothing to concatenate")
    names = list(tables[0].inputs)
    if any(sorted(table.inputs) != sorted(names) for table in tables):
        raise ValueError("the tables have inputs of different names")
    number_of: dict[str, int] = {}
    units = [
        np.array([number_of.setdefault(unit, len(number_of)) for unit in table.unit_ids], np.int64)[
            table.units
        ]
        for table in tables
    ]
    return Examples(
        inputs={name: np.concatenate([table.inputs[name] for table in tables]) for name in names},
        targets=np.concatenate([table.targets for table in tables]),
        units=np.concatenate(units),
        unit_ids=tuple(number_of),
    )
