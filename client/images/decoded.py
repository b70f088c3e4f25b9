"""From records to examples: decode every image once, on all cores, and put each unit on one side."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.images.batch import decode_all, on_all_cores
from client.images.cache import DecodeCache, Decoded
from client.images.decode import DecodedImage, fitted, pixels_digest
from client.images.entries import ContentChanged, entry_digest, read_entry
from client.images.findings import label_matrix
from client.images.records import (
    ImageArray,
    ImageFiles,
    Records,
    SkippedImage,
    SkipReason,
    Unit,
    check_skipped,
)
from client.images.seen_files import SeenFiles
from client.images.splits import splits_of_units
from common.errors import DataError
from common.examples import Examples
from common.preprocessing import Preprocessing
from common.task_kinds import MULTI_LABEL


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DecodedRecords:
    """All usable images of a hospital (or a whole simulation), to be split and partitioned by unit."""

    examples: Examples
    classes: tuple[str, ...]
    unit: Unit
    unit_splits: tuple[str, ...]
    """(num_units,) the one split of each unit; all empty where the data name no split."""
    groups: Mapping[str, tuple[str, ...]]
    """(rows,) each: further columns such as `site`."""
    skipped: tuple[SkippedImage, ...]
    units_in_several_splits: int
    """Units whose images stood in several splits; each went to the strictest with all its images."""
    repeated_images: int
    """Images whose very same picture occurs before them."""
    layout: str = ""

    def __repr__(self) -> str:
        return f"DecodedRecords({self.examples!r}, skipped={len(self.skipped)})"

    @property
    def names_a_split(self) -> bool:
        """Whether the data say who trains and who tests."""
        return any(self.unit_splits)

    def split(self, name: str) -> Examples:
        """The examples of the units of one split; `train` also takes those without a named split."""
        wanted = (name, "") if name == "train" else (name,)
        return self.examples.select_units([u for u, split in enumerate(self.unit_splits) if split in wanted])

    def unit_groups(self, column: str) -> tuple[str, ...]:
        """(num_units,) value of a column for each unit; KeyError for a column that the data do not have.

        A unit seen under several values (a patient at two sites) goes to its most frequent one, the first
        in sort order among equals.
        """
        values = self.groups[column]
        counts = (Counter(values[row] for row in rows) for rows in self.examples.rows_of_units())
        return tuple(min(count, key=lambda value: (-count[value], value)) for count in counts)


def decode_records(
    records: Records,
    *,
    preprocessing: Preprocessing,
    cache_folder: Path | None,
    max_pixels: int,
    max_skipped_share: float,
) -> DecodedRecords:
    """Decode `records`, from the cache where they were decoded before.

    Units are patients; without patient ids, equal pictures are one unit named by their pixels. Raises
    DataError when nothing or too little is usable.
    """
    seen = SeenFiles(cache_folder, max_pixels=max_pixels)
    records, contents = _fingerprint(records, seen)
    try:
        decoded = _decode(records.source, contents, preprocessing, cache_folder, max_pixels)
    except DataError:
        seen.forget()
        raise
    seen.keep()
    failed = [SkippedImage(records.source.name(row), reason) for row, reason in decoded.failures.items()]
    usable = np.array([row for row in range(len(records)) if row not in decoded.failures], np.int64)
    skipped = (*records.skipped, *failed)
    check_skipped(len(usable), skipped, max_share=max_skipped_share)

    pixels = decoded.pixels if not failed else decoded.pixels[usable]
    pictures = [decoded.digests[row] for row in usable]
    ids = pictures if records.unit_ids is None else [records.unit_ids[row] for row in usable]
    number_of: dict[str, int] = {}
    units = np.array([number_of.setdefault(unit, len(number_of)) for unit in ids], np.int64)
    unit_splits, torn = splits_of_units(
        units, [records.splits[row] for row in usable], num_units=len(number_of)
    )
    return DecodedRecords(
        examples=Examples(
            inputs={"image": pixels},
            targets=targets_of([records.labels[row] for row in usable], records),
            units=units,
            unit_ids=tuple(number_of),
        ),
        classes=records.classes,
        unit=records.unit,
        unit_splits=unit_splits,
        groups={name: tuple(values[row] for row in usable) for name, values in records.groups.items()},
        skipped=skipped,
        units_in_several_splits=torn,
        repeated_images=len(pictures) - len(set(pictures)),
        layout=records.layout,
    )


def targets_of(labels: Sequence[str], records: Records) -> NDArray[np.int64]:
    """(rows,) class of each label, or (rows, classes) of 0 and 1 for a multi-label task."""
    if records.task == MULTI_LABEL:
        return label_matrix(labels, records.classes)
    class_of = {name: index for index, name in enumerate(records.classes)}
    return np.array([class_of[label] for label in labels], np.int64)


def _fingerprint(records: Records, seen: SeenFiles) -> tuple[Records, list[str]]:
    """The records that can be read at all, and a hash of each one's content."""
    source = records.source
    if isinstance(source, ImageArray):
        return records, [pixels_digest(pixels) for pixels in source.pixels]

    def digest_of(row: int) -> str:
        return entry_digest(source.paths[row], seen.digest) + source.view(row).mark

    outcomes = list(on_all_cores(digest_of, range(len(source))))
    unread = [
        SkippedImage(source.name(row), outcome)
        for row, outcome in enumerate(outcomes)
        if isinstance(outcome, SkipReason)
    ]
    if unread:
        readable = [row for row, outcome in enumerate(outcomes) if not isinstance(outcome, SkipReason)]
        records = records.take(readable, skipped=unread)
    contents = [outcome for outcome in outcomes if not isinstance(outcome, SkipReason)]
    # Rows of a split, and in it of a unit, lie together: selecting them is then a view of the mapped cache.
    first: dict[str, int] = {}
    firsts = [first.setdefault(unit, row) for row, unit in enumerate(records.unit_ids or contents)]
    order = sorted(range(len(records)), key=lambda row: (records.splits[row], firsts[row]))
    return records.take(order), [contents[row] for row in order]


def _decode(
    source: ImageFiles | ImageArray,
    contents: list[str],
    preprocessing: Preprocessing,
    cache_folder: Path | None,
    max_pixels: int,
) -> Decoded:
    if isinstance(source, ImageArray) and preprocessing.keeps(source.pixels):
        pixels = preprocessing.fit_array(source.pixels)
        return Decoded(pixels=pixels, digests=tuple(contents), failures={})

    def decode_row(row: int) -> DecodedImage:
        if isinstance(source, ImageArray):
            return DecodedImage(preprocessing.fit_array(source.pixels[row : row + 1])[0], contents[row])
        view = source.view(row)
        expected = contents[row].removesuffix(view.mark)
        try:
            picture = read_entry(source.paths[row], view, max_pixels=max_pixels, expected=expected)
        except ContentChanged:
            raise DataError(
                f"{source.name(row)} changed while it was read",
                why="pixels and hash would belong to different pictures",
                fix="wait until the images are copied completely, then start again",
            ) from None
        return fitted(picture, preprocessing)

    cache = None
    if cache_folder is not None:
        cache = DecodeCache(cache_folder, preprocessing, max_pixels=max_pixels)
    return decode_all(contents, decode_row, preprocessing=preprocessing, cache=cache, max_pixels=max_pixels)
