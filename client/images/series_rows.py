"""Series as examples: a patient's images in order of time, or the slices of a volume, one row each.

Two steps around decoding, which stays that of single images with its cache and its reasons: `series_records`
says before which image is which step of which series, `series_examples` puts the decoded ones together. An
image that cannot be used is missing from its series and is listed like any other.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.images.decode import content_digest, read_content
from client.images.decoded import DecodedRecords
from client.images.entries import entry_digest, entry_frames, format_name
from client.images.records import ImageFiles, Records, SkippedImage, SkipReason, Unusable, View
from client.images.tables import usual_column
from client.images.times import Moment, moments
from common.errors import DataError
from common.examples import Examples
from common.hospital_config import DataConfig
from common.series import IMAGE, PRESENT, YEARS
from common.series_form import SeriesForm

_SERIES: Final = "(series)"
_PLACE: Final = "(place)"
_FILE: Final = "(file)"
_OWN: Final = (_SERIES, _PLACE, _FILE)
"""Columns that carry the series through decoding; a table's own of these names are not seen."""
_BARE: Final = "-"


def series_records(records: Records, form: SeriesForm, data: DataConfig) -> Records:
    """Records with a row per step of every series. Raises DataError where the data hold no such series."""
    if not form.is_series:
        return records
    if form.kind == "slices":
        return _slices(records, form, data)
    return _visits(records, data)


def series_examples(decoded: DecodedRecords, form: SeriesForm) -> DecodedRecords:
    """One row per series, `common.series`: what `series_records` named, decoded.

    Of visits one row per patient: the label is that of the last visit; with `next_finding` that visit is not
    in the series, and patients with a single visit are left out. Raises DataError when nothing is left.
    """
    if not form.is_series:
        return decoded
    of_series: dict[str, list[int]] = defaultdict(list)
    for row, series in enumerate(decoded.groups[_SERIES]):
        of_series[series].append(row)
    moment_of = [_read(place) for place in decoded.groups[_PLACE]]
    kept: list[tuple[list[int], int]] = []
    skipped: list[SkippedImage] = []
    for rows in of_series.values():
        ordered = sorted(rows, key=lambda row: moment_of[row].place)
        seen = ordered
        if form.next_finding:
            seen = [row for row in ordered if moment_of[row].place < moment_of[ordered[-1]].place]
        if seen:
            kept.append((seen[-form.steps :] if form.kind == "visits" else seen, ordered[-1]))
        else:
            skipped += [SkippedImage(decoded.groups[_FILE][row], SkipReason.SINGLE_VISIT) for row in ordered]
    if not kept:
        raise DataError(
            "no patient has two visits",
            why="the task is the finding of the next visit",
            fix="name the patient and the time column, or choose the task classification",
        )
    return _put_together(decoded, form, kept, moment_of, skipped)


def longest(records: Records, form: SeriesForm, data: DataConfig) -> int:
    """Steps of the longest series, at most those of `form`, less the visit that is asked for; 2 or more."""
    counts: dict[str, int] = defaultdict(int)
    for series in series_records(records, form, data).groups[_SERIES]:
        counts[series] += 1
    most = max(counts.values(), default=1) - int(form.next_finding)
    return max(2, min(form.steps, most))


def as_visits(decoded: DecodedRecords, column: str, texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Columns that make decoded images of known patients steps of visits, taken when `texts` say."""
    ids = tuple(decoded.examples.unit_ids[unit] for unit in decoded.examples.units)
    found = [moment or Moment(0.0) for moment in moments(column, texts)]
    own = {_SERIES: ids, _PLACE: tuple(map(_written, found)), _FILE: ("",) * len(ids)}
    return {**decoded.groups, **own}


def _put_together(
    decoded: DecodedRecords,
    form: SeriesForm,
    kept: Sequence[tuple[list[int], int]],
    moment_of: Sequence[Moment],
    skipped: Sequence[SkippedImage],
) -> DecodedRecords:
    pictures = decoded.examples.inputs[IMAGE]
    # Untouched zeros take no memory: what is held is about the images that there are.
    images = np.zeros((len(kept), form.steps, *pictures.shape[1:]), np.uint8)
    present = np.zeros((len(kept), form.steps), np.float32)
    years = np.zeros((len(kept), form.steps), np.float32)
    for number, (seen, _) in enumerate(kept):
        images[number, : len(seen)] = pictures[seen]
        present[number, : len(seen)] = 1
        if form.kind == "visits":
            gaps = [
                moment_of[after].years_since(moment_of[before])
                for before, after in zip(seen, seen[1:], strict=False)
            ]
            years[number, 1 : len(seen)] = gaps
    told = np.array([row for _, row in kept], np.int64)
    before = decoded.examples.units[told]
    found, units = np.unique(before, return_inverse=True)
    examples = Examples(
        inputs={IMAGE: images, PRESENT: present, YEARS: years},
        targets=decoded.examples.targets[told],
        units=units.astype(np.int64),
        unit_ids=tuple(decoded.examples.unit_ids[unit] for unit in found),
    )
    return replace(
        decoded,
        examples=examples,
        unit_splits=tuple(decoded.unit_splits[unit] for unit in found),
        groups={
            name: tuple(values[row] for row in told.tolist())
            for name, values in decoded.groups.items()
            if name not in _OWN
        },
        skipped=(*decoded.skipped, *skipped),
        layout=f"{decoded.layout}, as {form.words}" if decoded.layout else form.words,
    )


def _visits(records: Records, data: DataConfig) -> Records:
    if records.unit != "patient" or records.unit_ids is None:
        raise DataError(
            "visits cannot be put together",
            why="the data do not say whose image is whose",
            fix="name the column of the patient: data.patient-column (--patient-column)",
        )
    visits_of: dict[str, int] = defaultdict(int)
    for unit in records.unit_ids:
        visits_of[unit] += 1
    column = usual_column("time", list(records.groups), data.time_column)
    texts = ("",) * len(records) if column is None else records.groups[column]
    if column is None and max(visits_of.values(), default=0) > 1:
        raise DataError(
            "visits cannot be put in order",
            why=f"no column says when an image was taken; there are {', '.join(records.groups) or 'none'}",
            fix="name the column of the date or the day: data.time-column (--time-column)",
        )
    found = moments(column or "", texts)
    # The only image of a patient needs no time.
    known = [
        moment or (Moment(0.0) if visits_of[unit] == 1 else None)
        for moment, unit in zip(found, records.unit_ids, strict=True)
    ]
    kept = [row for row, moment in enumerate(known) if moment is not None]
    skipped = [
        SkippedImage(records.source.name(row), SkipReason.UNKNOWN_TIME)
        for row, moment in enumerate(known)
        if moment is None
    ]
    taken = records.take(kept, skipped=skipped)
    ids = taken.unit_ids or ()
    return _with_own(
        taken,
        # A patient who stands in two splits has one series; decoding puts it on one side.
        series=ids,
        places=[_written(moment) for moment in known if moment is not None],
    )


def _slices(records: Records, form: SeriesForm, data: DataConfig) -> Records:
    if not isinstance(records.source, ImageFiles):
        raise DataError(
            "an array of images holds no volumes",
            why="slices are read from DICOM series, NIfTI volumes and cines",
            fix="name a folder or a manifest of such files",
        )
    records = _joined_folders(records, data.max_pixels)
    paths, views, rows, places = [], [], [], []
    source = records.source
    assert isinstance(source, ImageFiles)
    for row, path in enumerate(source.paths):
        view = source.view(row)
        frames = _chosen(path, view, form.steps, data.max_pixels)
        for frame in frames:
            paths.append(path)
            views.append(view if frame is None else replace(view, frame=frame))
            rows.append(row)
            places.append(frame or 0)
    taken = replace(records.take(rows), source=ImageFiles(source.root, tuple(paths), tuple(views)))
    if taken.unit_ids is None:  # a volume is known by its content, as a picture is
        names = [_volume_name(path, data.max_pixels) for path in source.paths]
        taken = replace(taken, unit_ids=tuple(names[row] for row in rows))
    return _with_own(
        taken,
        series=[str(row) for row in rows],
        places=[_written(Moment(float(place), is_order=True)) for place in places],
    )


def _chosen(path: str, view: View, steps: int, max_pixels: int) -> list[int | None]:
    """Frames of an entry from 1, evenly spread; None (the default picture) where it cannot be opened."""
    if view.frame is not None:
        return [view.frame]
    try:
        count = entry_frames(path, max_pixels=max_pixels)
    except Unusable:
        return [None]  # decoding says why
    if count == 1:
        return [None]
    return [int(place) + 1 for place in evenly_spread(count, steps)]


def evenly_spread(count: int, most: int) -> NDArray[np.int64]:
    """Places 0..count-1, or `most` of them from the first to the last; the middle one where most is 1."""
    if count <= most:
        return np.arange(count, dtype=np.int64)
    if most == 1:
        return np.array([(count - 1) // 2], np.int64)
    return np.rint(np.linspace(0, count - 1, most)).astype(np.int64)


def _joined_folders(records: Records, max_pixels: int) -> Records:
    """One row for files that are the whole of one DICOM series, the others as they are."""
    source = records.source
    assert isinstance(source, ImageFiles)
    together: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for row, path in enumerate(source.paths):
        unit = _BARE if records.unit_ids is None else records.unit_ids[row]
        together[os.path.dirname(path), records.labels[row], unit, records.splits[row]].append(row)
    first: dict[int, str] = {}
    gone: set[int] = set()
    for (folder, *_), rows in together.items():
        if len(rows) < 2 or any(format_name(source.paths[row]) != "DICOM" for row in rows):
            continue
        try:
            whole = entry_frames(folder, max_pixels=max_pixels) == len(rows)
        except Unusable as unusable:
            whole = unusable.reason in (SkipReason.MISSING_SLICES, SkipReason.REPEATED_SLICES)
        if whole:
            first[rows[0]] = folder
            gone.update(rows[1:])
    if not first:
        return records
    rows = [row for row in range(len(records)) if row not in gone]
    taken = records.take(rows)
    paths = tuple(first.get(row, source.paths[row]) for row in rows)
    return replace(taken, source=replace(source.take(rows), paths=paths))


def _volume_name(path: str, max_pixels: int) -> str:
    try:
        return entry_digest(path, lambda file: content_digest(read_content(file, max_pixels=max_pixels)))
    except Unusable:
        return f"unread {path}"  # decoding leaves it out


def _with_own(records: Records, *, series: Sequence[str], places: Sequence[str]) -> Records:
    files = tuple(records.source.name(row) for row in range(len(records)))
    own = {_SERIES: tuple(series), _PLACE: tuple(places), _FILE: files}
    return replace(records, groups={**records.groups, **own})


def _written(moment: Moment) -> str:
    return f"{'#' if moment.is_order else ''}{moment.place!r}"


def _read(text: str) -> Moment:
    return Moment(float(text.removeprefix("#")), text.startswith("#"))
