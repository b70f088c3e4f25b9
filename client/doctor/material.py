"""What the doctor looks at: all usable images of a hospital, one row each."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.doctor.facts import Facts
from client.images.records import Unit


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Material:
    """Columns of equal length; private."""

    pixels: NDArray[np.uint8]
    """(rows, channels, size, size), as a model would see them, often mapped from the cache."""
    pictures: tuple[str, ...]
    """(rows,) fingerprint of each full-size picture."""
    names: tuple[str, ...]
    """(rows,) files as they may be shown: those named after a patient are hidden."""
    units: NDArray[np.int64]
    """(rows,) whose image it is."""
    unit: Unit
    splits: tuple[str, ...]
    """(rows,) who trains, validates and tests, in the end."""
    labels: tuple[str, ...]
    facts: tuple[Facts, ...]
    """(rows,) what the files say; empty for images that lie in an array."""

    def __len__(self) -> int:
        return len(self.names)

    def named(self, rows: list[int]) -> tuple[str, ...]:
        """Names of some rows."""
        return tuple(self.names[row] for row in rows)
