"""A simulated hospital's part: one `.npz` that its `hospital.toml` names as `data.path`.

It holds pixels that already fit the model, so the hospital starts in milliseconds, and neither names of files
nor patient ids: units stand there under keyed hashes. `client.images.npz` reads it like any other `.npz`.
"""

import hashlib
import hmac
import io
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.images.records import Unit
from common.examples import Examples
from common.files import write_bytes_atomically


def write_part(
    path: Path,
    *,
    train: Examples,
    validation: Examples | None = None,
    test: Examples | None = None,
    classes: Sequence[str],
    unit: Unit,
    key: bytes | None = None,
) -> Path:
    """Write `path` (0600, whole or not at all) and return it.

    Reading it with the same preprocessing and `classes` gives the same rows in the same order, with the
    units renamed. `key` makes the new names; without one they differ with each call and fit no other file.
    """
    key = key or secrets.token_bytes(32)
    arrays: dict[str, NDArray[np.generic]] = {"classes": np.array(classes), "unit": np.array(unit)}
    for prefix, examples in (("train", train), ("val", validation), ("test", test)):
        if examples is None or (examples.num_rows == 0 and prefix != "train"):
            continue
        names = np.array([_pseudonym(unit_id, key) for unit_id in examples.unit_ids], dtype="U32")
        pixels = examples.inputs["image"]
        arrays[f"{prefix}_images"] = pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)
        arrays[f"{prefix}_labels"] = examples.targets
        arrays[f"{prefix}_patients"] = names[examples.units]
    buffer = io.BytesIO()
    # Uncompressed: reading is a copy, and the numbers have been compressed by the resize already.
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes_atomically(path, buffer.getvalue(), mode=0o600)
    return path


def _pseudonym(unit_id: str, key: bytes) -> str:
    return hmac.new(key, unit_id.encode(), hashlib.sha256).hexdigest()[:32]
