"""Records: one row per image that was found, not yet decoded, and what was left out and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

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
        return self is not SkipReason.OTHER_FILE

    @property
    def remedy(self) -> str:
        """What a person can do about it."""
        return _REMEDIES[self]


_REMEDIES = {
    SkipReason.MISSING: "no such file: check the path column and data.path-root",
    SkipReason.EMPTY: "file of zero bytes: export it again",
    SkipReason.UNREADABLE: "not an image this version reads: export it as PNG or JPEG",
    SkipReason.TRUNCATED: "the file ends too early: copy it again",
    SkipReason.OVERSIZED: "larger than data.max-pixels: raise it if the picture is genuine",
    SkipReason.ESCAPING: "leads out of the data folder by a link, '..' or absolute path: copy the file in",
    SkipReason.SEVERAL_FRAMES: "several pictures in one file: export one per file",
    SkipReason.BLANK_PATH: "the row names no file: fill it in or remove the row",
    SkipReason.BLANK_LABEL: "the row has no label: fill it in or remove the row",
    SkipReason.UNKNOWN_LABEL: "the label is none of the federation's classes: rename it or remove the image",
    SkipReason.BLANK_PATIENT: "whose image it is stands nowhere: fill in the patient column",
    SkipReason.UNKNOWN_SPLIT: "the split is none of train, validation, test: correct it",
    SkipReason.LISTED_TWICE: "the file stands in the table already: keep one row for each image",
    SkipReason.OTHER_FILE: "not an image: nothing to do",
}


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
    """(rows,) resolved absolute paths, checked to lie inside `root`."""

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        """The file as a person of the hospital knows it, from `root`."""
        return self.paths[row].removeprefix(f"{self.root}/")

    def take(self, rows: Sequence[int]) -> Self:
        """These rows in this order."""
        return replace(self, paths=tuple(self.paths[row] for row in rows))


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
    """(rows,) class names, or as written in the data while `classes` is empty."""
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
