"""Records: one row per image that was found, not yet decoded, and what was left out and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

Unit = Literal["patient", "image"]
"""Who is protected: a patient with all their images, or (no patient id known) one image."""


class SkipReason(StrEnum):
    """Why an image is not used."""

    MISSING = "missing"
    EMPTY = "empty"
    UNREADABLE = "unreadable"
    TRUNCATED = "truncated"
    OVERSIZED = "oversized"
    ESCAPING = "escaping"
    SEVERAL_FRAMES = "several-frames"
    NO_SUCH_FRAME = "no-such-frame"
    NO_PIXELS = "no-pixel-data"
    UNSUPPORTED = "unsupported-coding"
    INCONSISTENT = "inconsistent"
    SEVERAL_SERIES = "several-series"
    MISSING_SLICES = "missing-slices"
    REPEATED_SLICES = "repeated-slices"
    BLANK_PATH = "blank-path"
    BLANK_LABEL = "blank-label"
    UNKNOWN_LABEL = "unknown-label"
    BLANK_PATIENT = "blank-patient"
    UNKNOWN_SPLIT = "unknown-split"
    LISTED_TWICE = "listed-twice"
    OTHER_FILE = "other-file"

    @property
    def counts(self) -> bool:
        """Whether it counts against `data.max-skipped-share`: a file that never was an image does not."""
        return self not in (SkipReason.OTHER_FILE, SkipReason.NO_PIXELS)

    @property
    def remedy(self) -> str:
        """What a person can do about it."""
        return _REMEDIES[self]


_REMEDIES = {
    SkipReason.MISSING: "no such file: check the path column and data.path-root",
    SkipReason.EMPTY: "file of zero bytes: export it again",
    SkipReason.UNREADABLE: "not an image this version reads: export it as DICOM, NIfTI, PNG or JPEG",
    SkipReason.TRUNCATED: "the file ends too early: copy it again",
    SkipReason.OVERSIZED: "larger than data.max-pixels: raise it if the picture is genuine",
    SkipReason.ESCAPING: "leads out of the data folder by a link, '..' or absolute path: copy the file in",
    SkipReason.SEVERAL_FRAMES: "several pictures in one file: name one in a frame column, or export each",
    SkipReason.NO_SUCH_FRAME: "the file has no such frame, slice or volume: they count from 1",
    SkipReason.NO_PIXELS: "a DICOM file without a picture (report, plan, directory): nothing to do",
    SkipReason.UNSUPPORTED: "coded in a way that this version does not read: export it uncompressed",
    SkipReason.INCONSISTENT: "header and pixels contradict each other: export it again",
    SkipReason.SEVERAL_SERIES: "slices of several series in one folder: one folder for each series",
    SkipReason.MISSING_SLICES: "the series has a gap: export it again, or list its files one by one",
    SkipReason.REPEATED_SLICES: "two slices lie at one place: export the series again, or list its files",
    SkipReason.BLANK_PATH: "the row names no file: fill it in or remove the row",
    SkipReason.BLANK_LABEL: "the row has no label: fill it in or remove the row",
    SkipReason.UNKNOWN_LABEL: "the label is none of the federation's classes: rename it or remove the image",
    SkipReason.BLANK_PATIENT: "whose image it is stands nowhere: fill in the patient column",
    SkipReason.UNKNOWN_SPLIT: "the split is none of train, validation, test: correct it",
    SkipReason.LISTED_TWICE: "the file stands in the table already: keep one row for each image",
    SkipReason.OTHER_FILE: "not an image: nothing to do",
}


class Unusable(Exception):  # noqa: N818 - an answer about one image, caught by the reader
    """An image that is not used, and the reason."""

    def __init__(self, reason: SkipReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True)
class View:
    """Which picture of a file or series; files that hold one picture only are that picture."""

    frame: int | None = None
    """Frame or slice, from 1; None is the middle one, of an even number the first of the two."""
    volume: int | None = None
    """Of a 4-D NIfTI, from 1; None is the first."""

    def frame_of(self, count: int) -> int:
        """Place among `count` frames, from 0. Raises Unusable."""
        if self.frame is None or count == 1:
            return (count - 1) // 2
        return _place(self.frame, count)

    def volume_of(self, count: int) -> int:
        """Place among `count` volumes, from 0. Raises Unusable."""
        return 0 if self.volume is None or count == 1 else _place(self.volume, count)

    @property
    def mark(self) -> str:
        """What tells this view's picture from others of the same content; empty for the default."""
        named = (self.frame is not None, self.volume is not None)
        return f"#{self.frame or ''}/{self.volume or ''}" if any(named) else ""

    @property
    def words(self) -> str:
        """For a person, behind a file's name; empty for the default."""
        named = {"frame": self.frame, "volume": self.volume}
        stated = ", ".join(f"{name} {number}" for name, number in named.items() if number is not None)
        return f" ({stated})" if stated else ""


def _place(number: int, count: int) -> int:
    if not 1 <= number <= count:
        raise Unusable(SkipReason.NO_SUCH_FRAME)
    return number - 1


WHOLE: Final = View()


@dataclass(frozen=True)
class SkippedImage:
    """An image that is not used; for the hospital's own eyes."""

    path: str
    reason: SkipReason


@dataclass(frozen=True)
class ImageFiles:
    """Image files inside a data folder."""

    root: Path
    paths: tuple[str, ...]
    """(rows,) resolved absolute paths, checked to lie inside `root`: files, or folders of a DICOM series."""
    views: tuple[View, ...] = ()
    """(rows,) which picture of each; empty takes the default of all."""

    def __len__(self) -> int:
        return len(self.paths)

    def view(self, row: int) -> View:
        """Which picture of the file."""
        return self.views[row] if self.views else WHOLE

    def name(self, row: int) -> str:
        """The file as a person of the hospital knows it, from `root`, and which picture of it."""
        return self.paths[row].removeprefix(f"{self.root}/") + self.view(row).words

    def take(self, rows: Sequence[int]) -> Self:
        """These rows in this order."""
        views = tuple(self.views[row] for row in rows) if self.views else ()
        return replace(self, paths=tuple(self.paths[row] for row in rows), views=views)


@dataclass(frozen=True, eq=False, repr=False)
class ImageArray:
    """Images that lie decoded in one array."""

    pixels: NDArray[np.uint8]
    """(rows, H, W) or (rows, H, W, 3)."""
    names: tuple[str, ...]
    """(rows,) such as `train_images[17]`."""

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, row: int) -> str:
        """Where the image stands in the file."""
        return self.names[row]

    def take(self, rows: Sequence[int]) -> Self:
        """These rows in this order; no copy when all are taken."""
        if list(rows) == list(range(len(self))):
            return self
        return type(self)(self.pixels[np.asarray(rows, np.int64)], tuple(self.names[row] for row in rows))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Records:
    """Images with label, unit, split and groups, in a fixed order that only the data decide."""

    source: ImageFiles | ImageArray
    labels: tuple[str, ...]
    """(rows,) class names, or as written in the data while `classes` is empty; of several findings the names
    with `client.images.findings.SEPARATOR` between, empty for none of them."""
    unit: Unit
    unit_ids: tuple[str, ...] | None
    """(rows,) patient of each image; None where only the pixels will tell images apart."""
    splits: tuple[str, ...]
    """(rows,) `train`, `validation`, `test`; all empty where the data name no split."""
    groups: Mapping[str, tuple[str, ...]]
    """Further columns, (rows,) each: what a simulation may partition by, such as `site`."""
    classes: tuple[str, ...] = ()
    skipped: tuple[SkippedImage, ...] = ()
    layout: str = ""
    """Which layout was recognised, in words."""
    task: str = "classification"
    """What the labels are for, once they are written as `classes`; before, `multi-label` where they stand in
    several columns."""

    def __post_init__(self) -> None:
        columns = [self.labels, self.splits, *self.groups.values()]
        columns += [] if self.unit_ids is None else [self.unit_ids]
        if any(len(column) != len(self.source) for column in columns):
            raise ValueError("the columns of the records differ in length")

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"Records(rows={len(self)}, unit={self.unit!r}, skipped={len(self.skipped)})"

    @property
    def names_a_split(self) -> bool:
        """Whether the data say who trains and who tests."""
        return any(self.splits)

    def take(self, rows: Sequence[int], *, skipped: Sequence[SkippedImage] = ()) -> Self:
        """These rows in this order; `skipped` joins what was left out before."""
        return replace(
            self,
            source=self.source.take(rows),
            labels=tuple(self.labels[row] for row in rows),
            unit_ids=None if self.unit_ids is None else tuple(self.unit_ids[row] for row in rows),
            splits=tuple(self.splits[row] for row in rows),
            groups={name: tuple(values[row] for row in rows) for name, values in self.groups.items()},
            skipped=(*self.skipped, *skipped),
        )


def count_reasons(skipped: Sequence[SkippedImage]) -> dict[SkipReason, int]:
    """How many images were left out for each reason, in the order of the reasons."""
    reasons = [entry.reason for entry in skipped]
    return {reason: reasons.count(reason) for reason in SkipReason if reason in reasons}


def check_skipped(num_usable: int, skipped: Sequence[SkippedImage], *, max_share: float) -> None:
    """Raise DataError when nothing is usable or more than `max_share` of the images is not."""
    counted = [entry for entry in skipped if entry.reason.counts]
    share = len(counted) / max(1, num_usable + len(counted))
    if num_usable and share <= max_share:
        return
    reasons = count_reasons(counted if counted else skipped)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no image was found"
    examples = "; ".join(f"{entry.path} ({entry.reason})" for entry in (counted or list(skipped))[:3])
    fix = next((f"{reason}: {reason.remedy}" for reason in reasons), "put images there")
    if not num_usable:
        raise DataError("not one usable image", why=f"{why}; {examples}" if examples else why, fix=fix)
    raise DataError(
        f"{len(counted)} of {num_usable + len(counted)} images cannot be used ({share:.1%})",
        why=f"{why}; for example {examples}; data.max-skipped-share is {max_share:g}",
        fix=f"{fix}; or raise data.max-skipped-share",
    )
