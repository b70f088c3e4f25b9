"""What `flower-client check` says about a hospital's images: counts and problems as plain data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.images.cache import FOLDER
from client.images.dataset import HospitalImages, read_hospital_images, read_records
from client.images.entries import format_name
from client.images.records import ImageArray, SkippedImage, count_reasons
from client.images.splits import SPLITS
from common.errors import DataError
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing
from common.task_kinds import CLASSIFICATION

Row = tuple[str, str, str]
"""(check, result, what to do); the last is empty where nothing needs to be done."""
_FEW_UNITS = 50
_OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """State of a hospital's images; local, since counts of patients are private."""

    path: str
    problem: DataError | None
    """Why the images cannot be used at all; then the counts are empty."""
    layout: str = ""
    formats: Mapping[str, int] = field(default_factory=dict)
    """Entries by what their content is, those that cannot be used too."""
    unit: str = ""
    images: Mapping[str, Mapping[str, int]]
    """Images by split and class."""
    units: Mapping[str, int]
    """Patients (or images without patients) by split."""
    skipped: tuple[SkippedImage, ...] = ()
    skipped_share: float = 0.0
    max_skipped_share: float = 0.0
    units_in_several_splits: int = 0
    repeated_images: int = 0
    cache: str = ""
    """Folder of the decoded images; empty without one."""

    @property
    def is_usable(self) -> bool:
        """Whether a hospital would train on these images."""
        return self.problem is None and self.skipped_share <= self.max_skipped_share

    def rows(self) -> list[Row]:
        """A line for each check."""
        if self.problem is not None:
            return [
                ("images", self.problem.what, " ".join(filter(None, (self.problem.why, self.problem.fix))))
            ]
        return [
            ("layout", self.layout, ""),
            ("formats", ", ".join(f"{name} {count}" for name, count in self.formats.items()), ""),
            *self._count_rows(),
            *self._skip_rows(),
            self._split_row(),
            self._repeat_row(),
            ("cache", self.cache or "none: images are decoded at each start", ""),
        ]

    def _count_rows(self) -> list[Row]:
        rows: list[Row] = []
        for split in SPLITS:
            total = sum(self.images[split].values())
            if not total:
                rows.append((f"{split} images", "none", "name a train split" if split == "train" else ""))
                continue
            by_class = ", ".join(f"{name} {count}" for name, count in self.images[split].items())
            units = "" if self.unit == "image" else f" of {self.units[split]} patients"
            empty = [name for name, count in self.images[split].items() if not count]
            advice = f"no image of {', '.join(empty)}: correct if the hospital has none" if empty else ""
            rows.append((f"{split} images", f"{total}{units} ({by_class})", advice))
        if self.unit == "patient":
            rows.append(("unit of protection", "patient", ""))
        else:
            advice = "name a patient column, or accept that one image, not one patient, is protected"
            rows.append(("unit of protection", "image: no patient ids found", advice))
        if self.units["train"] < _FEW_UNITS:
            advice = "so few need much noise; the hospital's policy may refuse"
            rows.append(("size", f"{self.units['train']} {self.unit}s train", advice))
        return rows

    def _skip_rows(self) -> list[Row]:
        rows: list[Row] = []
        for reason, count in count_reasons(self.skipped).items():
            first = [entry.path for entry in self.skipped if entry.reason is reason][:3]
            more = f" and {count - len(first)} more" if count > len(first) else ""
            rows.append((f"skipped: {reason}", f"{count}: {', '.join(first)}{more}", reason.remedy))
        share = f"{self.skipped_share:.1%} of the images (at most {self.max_skipped_share:.1%})"
        too_many = self.skipped_share > self.max_skipped_share
        advice = "the hospital would stop: repair them or raise data.max-skipped-share" if too_many else ""
        return [*rows, ("skipped in all", share, advice)]

    def _split_row(self) -> Row:
        if not self.units_in_several_splits:
            return (f"{self.unit}s in several splits", "none", "")
        return (
            f"{self.unit}s in several splits",
            f"{self.units_in_several_splits}: each moved to test, else to validation, with all its images",
            "nothing must be done; correct the splits if they were meant otherwise",
        )

    def _repeat_row(self) -> Row:
        if not self.repeated_images:
            return ("repeated pictures", "none", "")
        advice = "" if self.unit == "image" else "check that the same film is not under two patients"
        return ("repeated pictures", str(self.repeated_images), advice)


def check_images(
    data: DataConfig,
    *,
    preprocessing: Preprocessing,
    classes: Sequence[str] | None,
    cache_folder: Path | None,
    split_key: bytes = b"",
    task: str = CLASSIFICATION,
) -> Checkup:
    """Read all images as training would and say how they are; data that cannot be used are a result too."""
    lenient = data.model_copy(update={"max_skipped_share": 1.0})
    try:
        images = read_hospital_images(
            lenient,
            preprocessing=preprocessing,
            classes=classes,
            cache_folder=cache_folder,
            split_key=split_key,
            task=task,
        )
    except DataError as problem:
        return Checkup(path=data.path, problem=problem, images={}, units={})
    return _describe(images, data, cache_folder, formats=_formats(lenient, classes, task))


def _formats(data: DataConfig, classes: Sequence[str] | None, task: str) -> dict[str, int]:
    """How many entries are of which format, the most frequent first."""
    source = read_records(data, classes=classes, task=task).source
    if isinstance(source, ImageArray):
        return {"array": len(source)}
    return dict(Counter(format_name(path) for path in source.paths).most_common())


def _describe(
    images: HospitalImages, data: DataConfig, cache_folder: Path | None, *, formats: Mapping[str, int]
) -> Checkup:
    parts = {split: getattr(images, split) for split in SPLITS}
    counted = sum(entry.reason.counts for entry in images.skipped)
    usable = sum(part.num_rows for part in parts.values())
    return Checkup(
        path=data.path,
        problem=None,
        layout=images.layout,
        formats=formats,
        unit=images.unit,
        images=images.counts,
        units={split: part.num_units for split, part in parts.items()},
        skipped=images.skipped,
        skipped_share=counted / (usable + counted),
        max_skipped_share=data.max_skipped_share,
        units_in_several_splits=images.units_in_several_splits,
        repeated_images=images.repeated_images,
        cache="" if cache_folder is None else str(cache_folder / FOLDER),
    )
