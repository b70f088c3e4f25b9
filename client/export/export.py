"""A stored model written for other programs, and read again to see that both say the same.

export_model(Path("runs/RUN"), Path("chest.onnx"), kind=ModelFormat.ONNX).largest_difference
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.export.formats import INPUT, OUTPUT, Run, add_metadata, read, write
from client.export.kind import ModelFormat
from client.prediction.passport import RESEARCH_ONLY, limits, passport
from client.prediction.stored_model import StoredModel, read_model
from common.errors import ConfigError, FederationError, ModelError

TOLERANCE = 1e-5
"""Largest difference of a probability between the file and the model."""
BATCHES = (1, 2, 7, 32)
"""Rows that are asked at once in the check."""
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that says what the model says."""

    path: Path
    kind: ModelFormat
    bytes: int
    largest_difference: float
    """Of a probability, over all images of the check."""
    metadata: Mapping[str, str]


def export_model(folder: Path, path: Path, *, kind: ModelFormat) -> Exported:
    """Write the model of `folder` to the new file `path`, which appears only when it proves right.

    Raises ConfigError, ModelError where that cannot be.
    """
    if path.exists():
        raise ConfigError(f"{path} exists", fix="name a new file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {path} does not exist", fix="make it first")
    stored = read_model(folder)
    from client.export.network import ExportedNetwork

    network = ExportedNetwork(stored).eval()
    prepared = stored.preprocessing
    handle, name = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=f".{kind.value}", dir=path.absolute().parent
    )
    os.close(handle)
    part = Path(name)
    try:
        write(kind, network, prepared.image_size, prepared.channels, part)
        add_metadata(kind, part, metadata_of(stored))
        written = read(kind, part)
        difference = largest_difference(stored, written.run)
        size = part.stat().st_size
        os.chmod(part, 0o644)
        os.link(part, path)  # unlike a rename it replaces nothing that appeared meanwhile
    except FileExistsError:
        raise ConfigError(f"{path} exists", fix="name a new file") from None
    finally:
        part.unlink(missing_ok=True)
    return Exported(
        path=path, kind=kind, bytes=size, largest_difference=difference, metadata=written.metadata
    )


def largest_difference(stored: StoredModel, run: Run) -> float:
    """Largest difference of a probability between `run` and the model, over batches of several sizes.

    Half of the images are random grey values, half generated ones with the spectrum of photographs. Raises
    ModelError above TOLERANCE, and where an answer has another shape or is no number.
    """
    from common.scoring import image_probabilities

    worst = 0.0
    for rows in BATCHES:
        images = _images(stored, rows)
        expected = image_probabilities(
            stored.network, stored.task, images, preprocessing=stored.preprocessing
        )
        try:
            found = run(images.astype(np.float32))
        except FederationError:
            raise
        except Exception as error:  # whatever the runtime raises, the file cannot be used
            raise ModelError(
                "the exported file cannot be run", why=f"{type(error).__name__}: {error}"
            ) from None
        if found.shape != expected.shape:
            raise ModelError(
                "the exported file does not say what the model says",
                why=f"it gives an array of shape {found.shape} in place of {expected.shape}",
            )
        difference = np.abs(found - expected).max()
        worst = max(worst, float(difference)) if np.isfinite(difference) else float("inf")
    if worst > TOLERANCE:
        raise ModelError(
            "the exported file does not say what the model says",
            why=f"a probability differs by {worst:.2g}, allowed is {TOLERANCE:g}; the file was removed",
            fix="try the other format, or use `flower-client predict`",
        )
    return worst


def metadata_of(stored: StoredModel) -> dict[str, str]:
    """What must travel with the file; values that are no plain text are JSON."""
    prepared, classes = stored.preprocessing, list(stored.task.classes)
    channels, side = prepared.channels, prepared.image_size
    privacy = stored.description.get("privacy") or {}
    plain = {
        "use": RESEARCH_ONLY,
        "run_id": stored.run_id,
        "sha256": stored.sha256,
        "task": stored.task.name,
        INPUT: f"float32 (rows, {channels}, {side}, {side}): the whole picture resized as "
        "`preprocessing` says, grey values 0 to 255, air dark and bone bright; scaling is part of the graph",
        OUTPUT: "float32 (rows, classes)",
        "decision": stored.rule,
    }
    as_json = {
        "classes": classes,
        "preprocessing": prepared.to_dict(),
        "operating_point": stored.description.get("operating_point"),
        "calibration": stored.description.get("calibration"),
        "privacy": privacy,
        "passport": dict(passport(stored)),
        "limits": limits(stored),
    }
    return plain | {name: json.dumps(value, ensure_ascii=False) for name, value in as_json.items()}


def _images(stored: StoredModel, rows: int) -> NDArray[np.uint8]:
    from common.models.generated_images import generated_images

    channels, side = stored.preprocessing.channels, stored.preprocessing.image_size
    random = np.random.default_rng([_SEED, rows])
    images = random.integers(0, 256, (rows, channels, side, side), dtype=np.uint8)
    smooth = rows - rows // 2
    pictures = generated_images(smooth * channels, side).reshape(smooth, channels, side, side)
    images[:smooth] = np.rint(pictures * 255).astype(np.uint8)
    return images
