"""Layout 1: a MedMNIST `.npz` with `{train,val,test}_images` and `_labels`.

Further arrays of one text or number per image are read where they are: `train_patients` (the units),
`train_sites` (the group `site`) and so on; `classes` names the labels; `unit` says what a patient entry is
(a simulated hospital's part without patients says "image").
"""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from client.images.findings import joined_numbers
from client.images.parts import is_part, mapped_images
from client.images.records import ImageArray, Records, SkippedImage, SkipReason, Unit
from client.images.splits import split_named
from common.errors import DataError
from common.task_kinds import CLASSIFICATION, MULTI_LABEL

_DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)
_FIX = (
    "expected train_images uint8 (N, H, W) or (N, H, W, 3) and train_labels (N,) or (N, 1), also val_, test_"
)


def read_npz(path: Path, *, max_pixels: int) -> Records:
    """Records of a `.npz`; nothing pickled is read. Raises DataError for any other content."""
    _check_headers(path, max_pixels)
    try:
        with np.load(path, allow_pickle=False) as archive:
            mapped = mapped_images(path) if is_part(archive.files) else {}
            columns = {name: mapped[name] if name in mapped else archive[name] for name in archive.files}
    except (*_DAMAGE, MemoryError) as error:
        raise DataError(f"{path} cannot be read", why=str(error), fix="copy or export it again") from None
    classes = _texts(columns["classes"]) if "classes" in columns else ()
    blocks = list(_blocks(path, columns))
    if not blocks:
        raise DataError(f"{path} holds no images", why=f"its arrays are {sorted(columns)}", fix=_FIX)
    if len({images.shape[1:] for _, images, _ in blocks}) > 1:
        raise DataError(f"{path} has images of different sizes in its splits", fix=_FIX)
    if len({"patient" in block for _, _, block in blocks}) > 1:
        raise DataError(f"{path} names the patients of some splits only", fix="name them in all or in none")
    shared = set.intersection(*(set(block) for _, _, block in blocks)) - {"label"}
    joined = {name: tuple(v for _, _, block in blocks for v in block[name]) for name in shared | {"label"}}
    patients = joined.pop("patient", None)
    stacked = [images for _, images, _ in blocks]
    names = tuple(f"{prefix}_images[{row}]" for prefix, images, _ in blocks for row in range(len(images)))
    records = Records(
        source=ImageArray(stacked[0] if len(stacked) == 1 else np.concatenate(stacked), names),
        labels=joined.pop("label"),
        unit=_unit(path, columns, patients),
        unit_ids=patients,
        splits=tuple(split_named(prefix) or "" for prefix, images, _ in blocks for _ in images),
        groups=joined,
        classes=classes,
        task=MULTI_LABEL if _has_findings(columns) else CLASSIFICATION,
        layout="MedMNIST .npz",
    )
    return _without_blank_patients(records)


def _blocks(
    path: Path, columns: dict[str, NDArray[Any]]
) -> Iterator[tuple[str, NDArray[np.uint8], dict[str, tuple[str, ...]]]]:
    """(prefix, images, texts per column) of each split that the file has, training first."""
    prefixes = [name.removesuffix("_images") for name in columns if name.endswith("_images")]
    order = ["train", "validation", "test"]
    known = sorted((p for p in prefixes if split_named(p)), key=lambda p: order.index(split_named(p) or ""))
    for prefix in known:
        images = columns[f"{prefix}_images"]
        if images.ndim == 4 and images.shape[3] == 1:
            images = images[..., 0]
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
            raise DataError(
                f"{path}: {prefix}_images is {images.dtype} {images.shape}",
                why="volumes and other pixel types are not read from this layout",
                fix=_FIX,
            )
        if f"{prefix}_labels" not in columns:
            raise DataError(f"{path}: {prefix}_images has no {prefix}_labels", fix=_FIX)
        texts = {
            _singular(name.removeprefix(f"{prefix}_")): _column(path, name, values, len(images))
            for name, values in columns.items()
            if name.startswith(f"{prefix}_") and name != f"{prefix}_images"
        }
        yield prefix, images, {name: column for name, column in texts.items() if column is not None}


def _column(path: Path, name: str, values: NDArray[Any], rows: int) -> tuple[str, ...] | None:
    """(rows,) texts of a column (N,) or (N, 1), of labels also (N, K); None for any other, such as boxes."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.shape == (rows,):
        return _texts(values)
    if name.endswith("_labels"):
        if values.ndim == 2 and len(values) == rows and np.isin(values, (0, 1)).all():
            return joined_numbers(values)
        raise DataError(
            f"{path}: {name} is {values.shape} for {rows} images",
            why="one label per image, or several columns of 0 and 1",
            fix=_FIX,
        )
    if name.endswith("_patients"):
        raise DataError(f"{path}: {name} is {values.shape} for {rows} images", fix="one text for each image")
    return None


def _has_findings(columns: dict[str, NDArray[Any]]) -> bool:
    """Whether labels stand in several columns of 0 and 1."""
    labels = (values for name, values in columns.items() if name.endswith("_labels"))
    return any(values.ndim == 2 and values.shape[1] > 1 for values in labels)


def _texts(values: NDArray[Any]) -> tuple[str, ...]:
    """Texts of a 1-D array; whole numbers without a decimal point."""
    if values.dtype.kind == "f":
        return tuple(str(int(v)) if np.isfinite(v) and v == int(v) else str(v) for v in values)
    if values.dtype.kind == "b":
        values = values.astype(np.int64)
    return tuple(str(value).strip() for value in values.tolist())


def _unit(path: Path, columns: dict[str, NDArray[Any]], patients: tuple[str, ...] | None) -> Unit:
    stated = str(columns["unit"]) if "unit" in columns else "patient"
    if stated not in ("patient", "image"):
        raise DataError(f"{path}: unit is {stated!r}", fix="write patient or image")
    return "patient" if patients is not None and stated == "patient" else "image"


def _without_blank_patients(records: Records) -> Records:
    if records.unit_ids is None or all(records.unit_ids):
        return records
    blank = [row for row, unit in enumerate(records.unit_ids) if not unit]
    skipped = [SkippedImage(records.source.name(row), SkipReason.BLANK_PATIENT) for row in blank]
    return records.take([row for row, unit in enumerate(records.unit_ids) if unit], skipped=skipped)


def _singular(column: str) -> str:
    return column.removesuffix("s")


def _check_headers(path: Path, max_pixels: int) -> None:
    """Refuse objects (pickle), oversized images and announced sizes that the file does not hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    continue
                with archive.open(member) as file:
                    shape, dtype = _header(file)
                    announced = int(np.prod(shape, dtype=object)) * dtype.itemsize + file.tell()
                name = member.filename.removesuffix(".npy")
                if dtype.hasobject:
                    raise DataError(f"{path}: {name} holds pickled objects", fix=_FIX)
                if announced != member.file_size:
                    raise DataError(f"{path}: {name} is cut off", fix="copy or export it again")
                if name.endswith("_images") and int(np.prod(shape[1:3], dtype=object)) > max_pixels:
                    raise DataError(
                        f"{path}: the images of {name} have more than {max_pixels} pixels",
                        fix="raise data.max-pixels if they are genuine",
                    )
    except _DAMAGE as error:
        raise DataError(
            f"{path} is not a whole .npz", why=str(error), fix="copy or export it again"
        ) from None


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype
