"""Layout 2: folders `split/class/*` or `class/*`; a table beside them may say whose each image is."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from client.images.content import HEAD_BYTES, Format, format_of
from client.images.decode import DataFolder
from client.images.entries import companion
from client.images.records import ImageFiles, Records, SkippedImage, SkipReason, Unusable
from client.images.splits import split_named
from client.images.tables import SUFFIXES as TABLE_SUFFIXES
from client.images.tables import Table, read_table
from common.errors import DataError
from common.hospital_config import DataConfig

SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp"]
    + [".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".dcm", ".dicom", ".nii", ".hdr"]
)
"""Names that announce an image; of a file with another name its first bytes tell."""


@dataclass(frozen=True)
class ClassFolder:
    """A folder whose name is the label of all images below it."""

    path: Path
    label: str
    split: str


def find_class_folders(root: Path) -> list[ClassFolder]:
    """Class folders below `root` in sorted order: of its split folders if there are any, else its own."""
    folders = _subfolders(root)
    in_splits = [
        ClassFolder(inner, inner.name, split)
        for outer in folders
        if (split := split_named(outer.name)) is not None
        for inner in _subfolders(outer)
    ]
    return in_splits or [ClassFolder(folder, folder.name, "") for folder in folders if _holds_images(folder)]


def read_folders(root: Path, data: DataConfig) -> Records:
    """Records of a folder layout. `root` is resolved. Raises DataError for a table that does not fit."""
    folders = find_class_folders(root)
    inside = DataFolder(root)
    paths: list[str] = []
    found: list[ClassFolder] = []
    skipped: list[SkippedImage] = []
    for folder in folders:
        for name in files_below(folder.path):
            relative = name.removeprefix(f"{root}/")
            try:
                if os.path.islink(name) and os.path.isdir(name):
                    raise Unusable(SkipReason.ESCAPING)  # a linked folder may lead anywhere, and in circles
                if not may_be_image(name):
                    raise Unusable(SkipReason.OTHER_FILE)
                paths.append(inside.locate(relative))
            except Unusable as unusable:
                skipped.append(SkippedImage(relative, unusable.reason))
            else:
                found.append(folder)
    records = Records(
        source=ImageFiles(root, tuple(paths)),
        labels=tuple(folder.label for folder in found),
        unit="image",
        unit_ids=None,
        splits=tuple(folder.split for folder in found),
        groups={},
        skipped=tuple(skipped),
        layout="folders split/class/*" if any(folder.split for folder in folders) else "folders class/*",
    )
    return _with_patients(records, root, data)


def _with_patients(records: Records, root: Path, data: DataConfig) -> Records:
    """Take patients and further columns from the first table in `root` that names both files and patients."""
    for path in tables_in(root):
        table = read_table(path)
        if all(not name or name in table.columns for name in (data.patient_column, data.path_column)):
            patient_column = table.column("patient", data.patient_column)
            path_column = table.column("path", data.path_column)
            if patient_column and path_column:
                return _join(records, table, path_column, patient_column)
    if data.patient_column:
        raise DataError(
            f"no table in {root} names files and patients",
            why=f"data.patient-column is {data.patient_column}",
            fix=f"put a CSV with the columns path,{data.patient_column} there, or remove the setting",
        )
    return records


def _join(records: Records, table: Table, path_column: str, patient_column: str) -> Records:
    rows = _rows_by_file(table, path_column)
    names = [records.source.name(row) for row in range(len(records))]
    bare = Counter(os.path.basename(name) for name in names)
    matched = [
        # A bare name says whose image it is only where one image has it.
        rows.get(name) or (rows.get(os.path.basename(name)) if bare[os.path.basename(name)] == 1 else None)
        for name in names
    ]
    if not any(matched):
        raise DataError(
            f"{table.path.name} names none of the images beside it",
            why=f"its column {path_column} begins with {next(iter(rows), 'nothing')!r}",
            fix=f"write paths from {table.path.parent}, such as {names[0] if names else 'class/name.png'}",
        )
    kept = [row for row, entry in enumerate(matched) if entry and entry[patient_column]]
    skipped = [
        SkippedImage(name, SkipReason.BLANK_PATIENT)
        for name, entry in zip(names, matched, strict=True)
        if not (entry and entry[patient_column])
    ]
    entries = [entry for entry in matched if entry and entry[patient_column]]
    taken = records.take(kept, skipped=skipped)
    return Records(
        source=taken.source,
        labels=taken.labels,
        unit="patient",
        unit_ids=tuple(entry[patient_column] for entry in entries),
        splits=taken.splits,
        groups={
            column: tuple(entry[column] for entry in entries)
            for column in table.others([path_column, patient_column])
        },
        skipped=taken.skipped,
        layout=f"{taken.layout}, patients from {table.path.name} ({patient_column})",
    )


def _rows_by_file(table: Table, path_column: str) -> dict[str, dict[str, str]]:
    """Rows by path from the table's folder, or by bare file name as the table has it."""
    return {
        os.path.normpath(row[path_column].replace("\\", "/")): row for row in table.rows if row[path_column]
    }


def tables_in(folder: Path) -> list[Path]:
    """CSV and TSV files of a folder in sorted order."""
    tables = (path for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES)
    return sorted(path for path in tables if path.is_file())


def _subfolders(folder: Path) -> list[Path]:
    """Visible folders inside `folder` in sorted order, links to folders among them."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _holds_images(folder: Path) -> bool:
    """Whether a folder is a class: it has images, or it is a link, which must be named when it is skipped."""
    return folder.is_symlink() or any(
        os.path.splitext(name)[1].lower() in SUFFIXES or _begins_as_image(name)
        for name in files_below(folder)
    )


def may_be_image(name: str) -> bool:
    """Whether a file is to be decoded. A name without an ending announces anything but DICOM's directory."""
    suffix = os.path.splitext(name)[1].lower()
    if name.lower().endswith((".img", ".img.gz")) and companion(name) is not None:
        return False  # the voxels of the header beside it
    if suffix in (*SUFFIXES, ""):
        return os.path.basename(name).upper() != "DICOMDIR"
    return _begins_as_image(name)


def _begins_as_image(name: str) -> bool:
    """Whether a file of any name begins as one of the formats; DICOM names often end in a number."""
    if os.path.islink(name) or not os.path.isfile(name):
        return False
    try:
        with open(name, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False
    return format_of(head) is not Format.UNKNOWN


def files_below(folder: Path) -> Iterator[str]:
    """Visible files at any depth in sorted order; a linked folder is given as itself, not entered."""
    if folder.is_symlink():
        yield str(folder)
        return
    for parent, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        linked = [name for name in inner if os.path.islink(os.path.join(parent, name))]
        yield from (os.path.join(parent, name) for name in linked)
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))
