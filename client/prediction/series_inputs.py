"""What a person names on the command line, as series: a table of visits, folders of visits, volumes."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from client.images.decode import DataFolder, read_content
from client.images.entries import entry_frames, format_name
from client.images.folders import may_be_image
from client.images.formats import most_bytes
from client.images.records import WHOLE, SkipReason, Unusable, View
from client.images.series_rows import evenly_spread
from client.images.tables import SUFFIXES as TABLE_SUFFIXES
from client.images.tables import Table, read_table
from client.images.times import Moment, moments
from client.prediction.inputs import Input, find_inputs
from common.errors import ConfigError, printable
from common.series_form import SeriesForm

_LONGEST_NAME = 400


class Step(NamedTuple):
    """One picture of a series."""

    path: str
    view: View
    years: float
    """Since the step before."""


@dataclass(frozen=True)
class SeriesInput(Input):
    """One series to be answered."""

    steps: tuple[Step, ...] = ()


def find_series(named: Sequence[Path], form: SeriesForm, *, max_pixels: int) -> list[SeriesInput]:
    """The series of tables, folders and files, in the order given.

    Slices: as `find_inputs`, each picture with all its slices. Visits: a CSV table with columns for path,
    patient and time is a series per patient; a folder is one patient, whose images must say when they were
    taken: by the study date of DICOM, or by a name that begins with a date such as 2024-01-31. Raises
    ConfigError for none at all, DataError for a table without such columns.
    """
    found: list[SeriesInput] = []
    if form.kind == "slices":
        return [_slices(one, form, max_pixels) for one in find_inputs(named, max_pixels=max_pixels)]
    for path in named:
        if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
            found += _of_table(read_table(path), form)
        elif path.is_dir():
            found.append(_of_folder(path, form, max_pixels))
        else:  # a patient's first visit
            real = os.path.realpath(path)
            found.append(SeriesInput(_name(str(path)), real, None, (Step(real, WHOLE, 0.0),)))
    if not found:
        raise ConfigError(
            "there is no series to answer",
            why="the table names no image",
            fix="name folders of a patient's images, or a table with columns path, patient and date",
        )
    return found


def _slices(one: Input, form: SeriesForm, max_pixels: int) -> SeriesInput:
    if one.reason is not None:
        return SeriesInput(one.name, one.path, one.reason)
    try:
        count = entry_frames(one.path, max_pixels=max_pixels)
    except Unusable as unusable:
        return SeriesInput(one.name, one.path, unusable.reason)
    places = evenly_spread(count, form.steps).tolist()
    views = [WHOLE] if count == 1 else [View(frame=place + 1) for place in places]
    return SeriesInput(one.name, one.path, None, tuple(Step(one.path, view, 0.0) for view in views))


def _of_table(table: Table, form: SeriesForm) -> list[SeriesInput]:
    path_column, patient_column = table.need("path"), table.need("patient")
    time_column = table.column("time")
    times = moments(time_column or "", [row[time_column] if time_column else "" for row in table.rows])
    inside = DataFolder(table.path.parent.resolve())
    rows_of: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(table.rows):
        if row[path_column]:
            rows_of[row[patient_column]].append(number)
    found = []
    for patient, rows in rows_of.items():
        name = _name(f"{table.path.name}: {patient or 'no patient'}")
        try:
            if not patient:
                raise Unusable(SkipReason.BLANK_PATIENT)
            paths = [inside.locate(table.rows[row][path_column], folders=True) for row in rows]
            steps = _in_order(paths, [times[row] for row in rows], form)
        except Unusable as unusable:
            found.append(SeriesInput(name, str(table.path), unusable.reason))
        else:
            found.append(SeriesInput(name, steps[-1].path, None, steps))
    return found


def _of_folder(folder: Path, form: SeriesForm, max_pixels: int) -> SeriesInput:
    name, root = _name(str(folder)), os.path.realpath(folder)
    inside = DataFolder(Path(root))
    names = sorted(name for name in os.listdir(root) if not name.startswith("."))
    try:
        paths = [
            inside.locate(name)
            for name in names
            if os.path.isfile(os.path.join(root, name)) and may_be_image(os.path.join(root, name))
        ]
        if not paths:
            raise Unusable(SkipReason.EMPTY)
        steps = _in_order(paths, [_taken(path, max_pixels) for path in paths], form)
    except Unusable as unusable:
        return SeriesInput(name, root, unusable.reason)
    return SeriesInput(name, steps[-1].path, None, steps)


def _taken(path: str, max_pixels: int) -> Moment | None:
    """When a file's image was taken, by its header or its name."""
    if format_name(path) == "DICOM":
        from client.images.dicom_file import parse_dicom

        content = read_content(path, max_pixels=max_pixels)
        try:
            date = str(parse_dicom(content, max_bytes=most_bytes(max_pixels)).header.get("StudyDate") or "")
        except Unusable:
            raise
        except Exception:
            raise Unusable(SkipReason.INCONSISTENT) from None
    else:
        date = os.path.basename(path)[:10]
    return moments("date", [date])[0]


def _in_order(paths: Sequence[str], times: Sequence[Moment | None], form: SeriesForm) -> tuple[Step, ...]:
    """The latest steps in order of time; the only image needs no time. Raises Unusable."""
    known = [time for time in times if time is not None]
    if len(paths) == 1:
        known = [Moment(0.0)]
    if len(known) < len(paths):
        raise Unusable(SkipReason.UNKNOWN_TIME)
    order = sorted(range(len(paths)), key=lambda place: known[place].place)[-form.steps :]
    gaps = [0.0] + [
        known[now].years_since(known[before]) for before, now in zip(order, order[1:], strict=False)
    ]
    return tuple(Step(paths[place], WHOLE, years) for place, years in zip(order, gaps, strict=True))


def _name(text: str) -> str:
    return printable(text, most=_LONGEST_NAME)
