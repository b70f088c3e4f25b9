"""Replies of the open round on disk: memory does not grow with the number of hospitals.

One file for all updates, each flat with its parameters in name order: float32 numbers, or whole numbers of
the round's grid (int8, then places and rest of what does not fit). Any stretch of any update can be read
alone. Not made durable: after a crash the round is asked again, and hospitals answer with the bytes they
sealed.
"""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import CheckpointError
from common.parameters import Parameters, Template, num_parameters
from common.quantisation import Levels


@dataclass(frozen=True, kw_only=True)
class SpooledVector:
    """A flat float32 update on disk."""

    file: int
    """Descriptor, open for reading."""
    offset: int
    """Bytes before the first number."""
    length: int
    """Count of numbers."""

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, out: npt.NDArray[np.float32]) -> None:
        """Fill `out` with the numbers from `start` on."""
        _read(self.file, self.offset + 4 * start, out)


@dataclass(frozen=True, kw_only=True)
class SpooledLevels:
    """A flat update in whole numbers on disk; see `common.quantisation.Levels`."""

    file: int
    offset: int
    length: int
    beside: int
    """How many numbers have a rest beside them."""

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, out: npt.NDArray[np.int8]) -> None:
        """Fill `out` with what fits of the numbers from `start` on."""
        _read(self.file, self.offset + start, out)

    def cuts(self, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many of the numbers with a rest come before each start."""
        return np.searchsorted(self._part(0, 0, self.beside, np.uint32), starts)

    def rest(self, first: int, last: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Places of the numbers with a rest, from the one to before the other, and their rest."""
        return self._part(0, first, last, np.uint32).astype(np.int64), self._part(1, first, last, np.int32)

    def whole(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The whole numbers of a stretch."""
        block = np.empty(stop - start, dtype=np.int8)
        self.read(start, block)
        result = block.astype(np.int64)
        first, last = self.cuts(np.array([start, stop]))
        places, rest = self.rest(int(first), int(last))
        result[places - start] += rest
        return result

    def _part(self, number: int, first: int, last: int, kind: type[np.generic]) -> npt.NDArray[Any]:
        part = np.empty(last - first, dtype=kind)
        _read(self.file, self.offset + self.length + 4 * (number * self.beside + first), part)
        return part


SpooledUpdate = SpooledVector | SpooledLevels


class Spool:
    """The folder of this round's valid updates, all of one model."""

    def __init__(self, folder: Path, template: Template) -> None:
        self._folder = folder
        self._path = folder / "updates"
        self._template = {name: template[name] for name in sorted(template)}
        self._length = num_parameters(template)
        self._places: dict[str, tuple[int, int | None]] = {}
        self.clear()

    def add(self, name: str, update: Parameters | Levels) -> None:
        """Keep the update of a hospital.

        Raises ValueError for one of another model, CheckpointError when the disk does not take it.
        """
        if isinstance(update, Levels):
            parts: list[npt.NDArray[Any]] = [update.fitting, update.places, update.rest]
            beside = len(update.places)
            fits = len(update.fitting) == self._length
        else:
            parts = [update[key] for key in self._template if key in update]
            beside = None
            fits = {key: array.shape for key, array in update.items()} == self._template
        if not fits:
            raise ValueError("the update is not of this round's model")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                offset = file.tell()
                for part in parts:
                    file.write(np.ascontiguousarray(part).data)
        except OSError as error:
            raise CheckpointError(
                "an update cannot be kept on disk",
                why=error.strerror or "",
                fix="free disk space, then resume",
            ) from None
        self._places[name] = offset, beside

    @contextmanager
    def opened(self, names: Sequence[str]) -> Iterator[list[SpooledUpdate]]:
        """The updates of `names` in that order, flat and still on disk, readable inside the `with`."""
        file = os.open(self._path, os.O_RDONLY)
        try:
            yield [self._spooled(file, *self._places[name]) for name in names]
        finally:
            os.close(file)

    def _spooled(self, file: int, offset: int, beside: int | None) -> SpooledUpdate:
        if beside is None:
            return SpooledVector(file=file, offset=offset, length=self._length)
        return SpooledLevels(file=file, offset=offset, length=self._length, beside=beside)

    def unflatten(self, vector: npt.NDArray[np.float32]) -> Parameters:
        """Cut a flat vector into the model's arrays; views, in name order."""
        result, start = {}, 0
        for name, shape in self._template.items():
            stop = start + math.prod(shape)
            result[name] = vector[start:stop].reshape(shape)
            start = stop
        return result

    def clear(self) -> None:
        """Forget all updates."""
        self._places.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


def _read(file: int, offset: int, out: npt.NDArray[Any]) -> None:
    if os.preadv(file, [out.data.cast("B")] if out.size else [], offset) != out.nbytes:
        raise CheckpointError(
            "the updates of this round were cut on disk",
            fix="resume: the round is asked again, and hospitals send what they have sealed",
        )
