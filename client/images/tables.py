"""Tables: CSV files that describe images, with columns found by name."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from common.errors import DataError

Role = Literal["path", "label", "patient", "split", "frame", "volume", "time"]
USUAL_NAMES: Final[dict[Role, tuple[str, ...]]] = {
    "path": (
        "path",
        "filepath",
        "imagepath",
        "filename",
        "file",
        "image",
        "imagefile",
        "imagename",
        "imageindex",
    ),
    "label": ("label", "class", "target", "finding", "diagnosis", "category", "labels", "findinglabels"),
    "patient": ("patient", "patientid", "subject", "subjectid", "pid", "patientkey"),
    "split": ("split", "set", "fold", "subset", "partition"),
    "frame": ("frame", "slice", "framenumber", "slicenumber", "frameno", "sliceno"),
    "volume": ("volume", "volumenumber"),
    "time": (
        "offset",
        "days",
        "day",
        "studydate",
        "acquisitiondate",
        "examdate",
        "visitdate",
        "date",
        "time",
        "visit",
        "visitnumber",
        "order",
    ),
}
"""Column names in order of preference, without regard to case, spaces and punctuation."""
SUFFIXES: Final = (".csv", ".tsv")
_DELIMITERS = ",;\t|"


@dataclass(frozen=True, kw_only=True, repr=False)
class Table:
    """A table of texts; every row has every column, spaces around values removed."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]
    """Line of the file on which each row ends, for messages."""

    def column(self, role: Role, configured: str = "") -> str | None:
        """Name of the column that plays `role`: the configured one, else a usual name, else None.

        A found column that is blank throughout plays no role. Raises DataError when the configured one is
        not there.
        """
        by_plain = {plain_name(column): column for column in reversed(self.columns)}
        if configured:
            column = configured if configured in self.columns else by_plain.get(plain_name(configured))
            if column is None:
                raise DataError(
                    f"{self.path.name} has no column {configured}",
                    why=f"its columns are {', '.join(self.columns)}",
                    fix=f"set data.{role}-column (--{role}-column) to one of them",
                )
            return column
        for name in USUAL_NAMES[role]:
            column = by_plain.get(name)
            if column is not None and any(row[column] for row in self.rows):
                return column
        return None

    def need(self, role: Role, configured: str = "") -> str:
        """Like `column`, with a DataError instead of None."""
        column = self.column(role, configured)
        if column is None:
            raise DataError(
                f"{self.path.name} has no column that looks like the {role} of an image",
                why=f"its columns are {', '.join(self.columns)}",
                fix=f"name it: data.{role}-column (--{role}-column)",
            )
        return column

    def others(self, taken: Sequence[str | None]) -> tuple[str, ...]:
        """Columns that play no private role."""
        return tuple(column for column in self.columns if column not in taken)


def read_table(path: Path) -> Table:
    """Read a CSV or TSV: UTF-8 (with or without mark) or marked UTF-16; the delimiter is found.

    Raises DataError for what is not such a table.
    """
    text = _text(path)
    header = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=header.count)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = [name.strip() for name in next(reader, [])]
        _check_header(path, names)
        rows, lines = [], []
        for values in reader:
            if any(value.strip() for value in values):
                padded = [*values, *[""] * len(names)]
                rows.append({name: value.strip() for name, value in zip(names, padded, strict=False) if name})
                lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV table", why=str(error), fix="export it as CSV again") from None
    return Table(
        path=path, columns=tuple(name for name in names if name), rows=tuple(rows), lines=tuple(lines)
    )


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read", why=str(error), fix="check the path and its rights"
        ) from None
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(
            f"{path} is neither an .npz nor a table in UTF-8",
            why="data.path is a MedMNIST .npz, a folder split/class/* or class/*, or a CSV manifest",
            fix="name one of these; a spreadsheet program saves a table as 'CSV UTF-8'",
        )
    return text


def _check_header(path: Path, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"{path} has two columns named {twice[0]}", fix="rename one of them")
    if sum(bool(name) for name in names) < 2:
        raise DataError(
            f"{path} is not a table with a header",
            why="its first line names fewer than two columns",
            fix="the first line of a manifest names the columns, such as path,label,patient",
        )


def usual_column(role: Role, columns: Sequence[str], configured: str = "") -> str | None:
    """Likewise among the names of columns that are no table's. Raises DataError."""
    by_plain = {plain_name(column): column for column in reversed(columns)}
    if configured:
        column = configured if configured in columns else by_plain.get(plain_name(configured))
        if column is None:
            raise DataError(
                f"the data have no column {configured}",
                why=f"their columns are {', '.join(columns) or 'none'}",
                fix=f"set data.{role}-column (--{role}-column) to one of them",
            )
        return column
    return next((by_plain[name] for name in USUAL_NAMES[role] if name in by_plain), None)


def plain_name(name: str) -> str:
    """A column's name without regard to case, spaces and punctuation."""
    return "".join(character for character in name.casefold() if character.isalnum())
