"""A simulated hospital's part: one `.npz` that its `hospital.toml` names as `data.path`.

It holds pixels that already fit the model, so the hospital starts in milliseconds, and neither names of files
nor patient ids: units stand there under keyed hashes. `client.images.npz` reads it like any other `.npz`.
"""

import hashlib
import hmac
import io
import secrets
import struct
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.images.records import Unit
from common.examples import Examples
from common.files import write_bytes_atomically
from common.series import IMAGE, is_series

_FIELDS = {IMAGE: "images"}

PREPARED: Final = "prepared"
"""Array of a part whose pixels were made by configured steps: the mark of these."""


def write_part(
    path: Path,
    *,
    train: Examples,
    validation: Examples | None = None,
    test: Examples | None = None,
    classes: Sequence[str],
    unit: Unit,
    key: bytes | None = None,
    mark: str = "",
) -> Path:
    """Write `path` (0600, whole or not at all) and return it.

    Reading it with the same preprocessing and `classes` gives the same rows in the same order, with the
    units renamed. `key` makes the new names; without one they differ with each call and fit no other file.
    `mark` is the `Preprocessing.mark` of the pixels, which is not done a second time.
    """
    key = key or secrets.token_bytes(32)
    arrays: dict[str, NDArray[np.generic]] = {"classes": np.array(classes), "unit": np.array(unit)}
    if mark:
        arrays[PREPARED] = np.array(mark)
    for prefix, examples in (("train", train), ("val", validation), ("test", test)):
        if examples is None or (examples.num_rows == 0 and prefix != "train"):
            continue
        names = np.array([_pseudonym(unit_id, key) for unit_id in examples.unit_ids], dtype="U32")
        pixels = examples.inputs["image"]
        if is_series(examples.inputs):
            arrays |= {f"{prefix}_{_FIELDS.get(key, key)}": values for key, values in examples.inputs.items()}
        else:
            grey = pixels.shape[1] == 1
            arrays[f"{prefix}_images"] = pixels[:, 0] if grey else pixels.transpose(0, 2, 3, 1)
        arrays[f"{prefix}_labels"] = examples.targets
        arrays[f"{prefix}_patients"] = names[examples.units]
    buffer = io.BytesIO()
    # Uncompressed: reading is a copy, and the numbers have been compressed by the resize already.
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes_atomically(path, buffer.getvalue(), mode=0o600)
    return path


def is_part(names: Collection[str]) -> bool:
    """Whether a `.npz` with arrays of these names is a simulated hospital's part: those say their unit."""
    return "unit" in names


def mapped_images(path: Path) -> dict[str, NDArray[np.uint8]]:
    """The images of a part, mapped from the file: the processes that read it share one copy.

    Only for files that stay as they are, as those of a run folder do. Raises OSError, ValueError,
    zipfile.BadZipFile.
    """
    found: dict[str, NDArray[np.uint8]] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if not name.endswith("_images") or member.compress_type != zipfile.ZIP_STORED:
                continue
            # The header beside the data may be longer than the one in the zip's list.
            file.seek(member.header_offset + 26)
            file.seek(sum(struct.unpack("<HH", file.read(4))), io.SEEK_CUR)
            if np.lib.format.read_magic(file) != (1, 0):
                continue
            shape, is_fortran, kind = np.lib.format.read_array_header_1_0(file)
            if kind == np.uint8 and not is_fortran and 0 not in shape:
                found[name] = np.memmap(path, kind, mode="r", offset=file.tell(), shape=shape)
    return found


def _pseudonym(unit_id: str, key: bytes) -> str:
    return hmac.new(key, unit_id.encode(), hashlib.sha256).hexdigest()[:32]
