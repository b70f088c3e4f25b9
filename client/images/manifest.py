"""Layout 3: a CSV manifest with one image per row."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from client.images.decode import DataFolder
from client.images.findings import LADDER, joined_columns, ladder_level
from client.images.records import ImageFiles, Records, SkippedImage, SkipReason, Unusable, View
from client.images.splits import split_named
from client.images.tables import Table
from common.errors import DataError
from common.hospital_config import DataConfig
from common.task_kinds import CLASSIFICATION, MULTI_LABEL


def read_manifest(table: Table, data: DataConfig) -> Records:
    """Records of a manifest; rows that name no usable file, label, patient or split are listed as skipped.

    Raises DataError when a needed column or the folder of the images is missing.
    """
    path_column = table.need("path", data.path_column)
    labels = label_columns(table, data)
    patient_column = table.column("patient", data.patient_column)
    split_column = _split_column(table, data)
    frame_column = _number_column(table, "frame", data.frame_column)
    volume_column = _number_column(table, "volume", data.volume_column)
    root = image_folder(table, data)
    inside = DataFolder(root)

    kept: list[dict[str, str]] = []
    entries: dict[tuple[str, View], None] = {}
    skipped: list[SkippedImage] = []
    for row, line in zip(table.rows, table.lines, strict=True):
        name = row[path_column]
        try:
            if not name:
                raise Unusable(SkipReason.BLANK_PATH)
            entry = (
                _locate(inside, name),
                View(frame=_number(row, frame_column), volume=_number(row, volume_column)),
            )
            if entry in entries:
                raise Unusable(SkipReason.LISTED_TWICE)
            if not _label(row, labels, data):
                raise Unusable(SkipReason.BLANK_LABEL)
            if patient_column and not row[patient_column]:
                raise Unusable(SkipReason.BLANK_PATIENT)
            if split_column and split_named(row[split_column]) is None:
                raise Unusable(SkipReason.UNKNOWN_SPLIT)
        except Unusable as unusable:
            skipped.append(SkippedImage(name or f"{table.path.name} line {line}", unusable.reason))
            continue
        entries[entry] = None
        kept.append(row)
    return Records(
        source=ImageFiles(root, tuple(path for path, _ in entries), tuple(view for _, view in entries)),
        labels=tuple(_label(row, labels, data) for row in kept),
        unit="patient" if patient_column else "image",
        unit_ids=tuple(row[patient_column] for row in kept) if patient_column else None,
        splits=tuple((split_column and split_named(row[split_column])) or "" for row in kept),
        groups={
            column: tuple(row[column] for row in kept)
            for column in table.others([path_column, patient_column])
        },
        skipped=tuple(skipped),
        task=MULTI_LABEL if len(labels) > 1 and _sign(data.label_column) == "," else CLASSIFICATION,
        layout=_describe(
            path_column, ", ".join(labels), patient_column, split_column, frame_column, volume_column
        ),
    )


def label_columns(table: Table, data: DataConfig) -> tuple[str, ...]:
    """The column of the label, or several of yes and no, with commas or `>` between (`data.label-column`)."""
    configured = data.label_column
    if configured in table.columns or _sign(configured) == "":
        return (table.need("label", configured),)
    names = configured.split(_sign(configured))
    return tuple(table.need("label", name.strip()) for name in names if name.strip())


def _sign(configured: str) -> str:
    """What stands between columns: `>` of a ladder, commas of findings, nothing of one column."""
    return next((sign for sign in (LADDER, ",") if sign in configured), "")


def _label(row: Mapping[str, str], columns: Sequence[str], data: DataConfig) -> str:
    if len(columns) == 1:
        return row[columns[0]]
    return (ladder_level if _sign(data.label_column) == LADDER else joined_columns)(row, columns)


def image_folder(table: Table, data: DataConfig) -> Path:
    """Resolved folder that the paths of a manifest start from."""
    beside = table.path.parent
    root = Path(data.path_root) if data.path_root else beside
    if not root.is_dir() and (beside / root).is_dir():
        root = beside / root
    if not root.is_dir():
        raise DataError(
            f"there is no folder {data.path_root}",
            why="data.path-root is where the paths of the manifest start",
            fix="set data.path-root (--path-root) to an existing folder",
        )
    return root.resolve()


def _locate(inside: DataFolder, name: str) -> str:
    try:
        return inside.locate(name, folders=True)
    except Unusable as unusable:
        # Tables made on Windows separate folders by backslashes.
        if unusable.reason is not SkipReason.MISSING or "\\" not in name:
            raise
        return inside.locate(name.replace("\\", os.sep), folders=True)


def _split_column(table: Table, data: DataConfig) -> str | None:
    """The split column; one found by its name counts only if it names a split (`fold` may hold numbers)."""
    column = table.column("split", data.split_column)
    if column is None or data.split_column or any(split_named(row[column]) for row in table.rows):
        return column
    return None


def _number_column(table: Table, role: Literal["frame", "volume"], configured: str) -> str | None:
    """The column of frames or volumes; one found by its name counts only if it holds nothing else."""
    column = table.column(role, configured)
    if column is None or configured or all(_parsed(row[column]) != 0 for row in table.rows):
        return column
    return None


def _number(row: Mapping[str, str], column: str | None) -> int | None:
    """The number in a row's column, from 1; None where it is blank or `middle`. Raises Unusable."""
    number = None if column is None else _parsed(row[column])
    if number == 0:
        raise Unusable(SkipReason.NO_SUCH_FRAME)
    return number


def _parsed(text: str) -> int | None:
    """A whole number from 1, None for the default, 0 for what is neither; spreadsheets write 3 as 3.0."""
    if text.casefold() in ("", "middle"):
        return None
    digits = text.removesuffix(".0")
    return int(digits) if digits.isdecimal() and digits.isascii() and len(digits) < 10 else 0


def _describe(
    path: str, label: str, patient: str | None, split: str | None, frame: str | None, volume: str | None
) -> str:
    pictures = {"frame": frame, "volume": volume}
    more = "".join(f", {role}: {column}" for role, column in pictures.items() if column)
    who = f"patient: {patient or 'none'}, split: {split or 'none'}"
    return f"CSV manifest (path: {path}, label: {label}, {who}{more})"
