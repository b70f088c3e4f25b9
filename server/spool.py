"""Replies of the open round on disk: memory does not grow with the number of hospitals.

One safetensors file per hospital. All hold the same names and shapes, hence the same header, so a file is
one flat float32 vector behind it, and any stretch of it can be read alone. Not made durable: after a crash
the round is asked again, and hospitals answer with the bytes they sealed.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from common.errors import CheckpointError
from common.parameters import Parameters


@dataclass(frozen=True)
class SpooledVector:
    """A flat update on disk; `vector[start:stop]` reads that stretch and keeps nothing."""

    path: Path
    offset: int
    """Bytes before the first number."""
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, stretch: slice) -> npt.NDArray[np.float32]:
        start, stop, _ = stretch.indices(self.length)
        return np.fromfile(self.path, dtype="<f4", count=stop - start, offset=self.offset + 4 * start)


class Spool:
    """The folder of this round's valid updates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.clear()

    def add(self, name: str, delta: Parameters) -> None:
        """Keep the update of a hospital. Raises CheckpointError when the disk does not take it."""
        content = save({key: np.asarray(delta[key], dtype="<f4", order="C") for key in sorted(delta)})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._path(name).write_bytes(content)
        except OSError as error:
            raise CheckpointError(
                "an update cannot be kept on disk",
                why=error.strerror or "",
                fix="free disk space, then resume",
            ) from None

    def vectors(self, names: Sequence[str]) -> list[SpooledVector]:
        """The updates of `names` in that order, flat and still on disk. Raises ValueError on a mixture."""
        headers = [_header(self._path(name)) for name in names]
        if len(set(headers)) > 1:
            raise ValueError("the spooled updates are not of one model")
        paths = [self._path(name) for name in names]
        return [
            SpooledVector(path, 8 + len(header), (path.stat().st_size - 8 - len(header)) // 4)
            for path, header in zip(paths, headers, strict=True)
        ]

    def unflatten(self, name: str, vector: npt.NDArray[np.float32]) -> Parameters:
        """Cut a flat vector into the arrays that the file of `name` describes; views, in name order."""
        fields = json.loads(_header(self._path(name)))
        fields.pop("__metadata__", None)
        return {
            key: vector[start // 4 : end // 4].reshape(field["shape"])
            for key, field in sorted(fields.items())
            for start, end in [field["data_offsets"]]
        }

    def clear(self) -> None:
        """Forget all updates."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
