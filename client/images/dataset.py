"""A hospital's images, ready for training: found, checked, decoded and split.

data = DataConfig(path="scans.csv")
images = read_hospital_images(data, preprocessing=..., classes=("normal", "opacity"), cache_folder=None)
images.train.num_units    # patients who train; private
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.images.decoded import DecodedRecords, decode_records
from client.images.labels import with_classes
from client.images.layout import find_records
from client.images.records import Records, SkippedImage, Unit, check_skipped
from client.images.splits import SPLITS, TEST, TRAIN, VALIDATION, keyed_choice
from common.examples import Examples
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing
from common.task_kinds import CLASSIFICATION


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HospitalImages:
    """What a hospital trains, validates and tests on; private. No unit is in two of the three."""

    train: Examples
    validation: Examples
    test: Examples
    classes: tuple[str, ...]
    unit: Unit
    skipped: tuple[SkippedImage, ...]
    """Images that are not used and why; for the hospital's own eyes."""
    units_in_several_splits: int
    """Units whose images stood in several splits; each went to the strictest with all its images."""
    repeated_images: int
    """Images whose very same picture occurs before them."""
    layout: str
    """Which layout was recognised, in words."""

    def __repr__(self) -> str:
        return f"HospitalImages(train={self.train!r}, validation={self.validation!r}, test={self.test!r})"

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Images of each class in each split; one with several findings counts for each of them."""
        table: dict[str, dict[str, int]] = {}
        for split in SPLITS:
            targets = getattr(self, split).targets
            several = targets.ndim == 2
            counted = targets.sum(axis=0) if several else np.bincount(targets, minlength=len(self.classes))
            table[split] = dict(zip(self.classes, counted.tolist(), strict=True))
        return table


def read_records(data: DataConfig, *, classes: Sequence[str] | None, task: str = CLASSIFICATION) -> Records:
    """Find the images without decoding one; labels become `classes` (those in the data when None).

    Raises DataError when the data are in no known layout or nothing is left.
    """
    found = find_records(data)
    if not len(found):
        check_skipped(0, found.skipped, max_share=1.0)
    records = with_classes(found, classes, task=task)
    if not len(records):
        check_skipped(0, records.skipped, max_share=1.0)
    return records


def read_hospital_images(
    data: DataConfig,
    *,
    preprocessing: Preprocessing,
    classes: Sequence[str] | None,
    cache_folder: Path | None,
    split_key: bytes = b"",
    task: str = CLASSIFICATION,
) -> HospitalImages:
    """Read all images of a hospital.

    `split_key` is the site's secret that decides, with `data.validation_share`, who validates where the data
    name no validation split. Raises DataError, ValueError for a share without a key.
    """
    if data.validation_share and not split_key:
        raise ValueError("validation_share needs a split_key: without a secret anybody could tell who trains")
    decoded = decode_records(
        read_records(data, classes=classes, task=task),
        preprocessing=preprocessing,
        cache_folder=cache_folder,
        max_pixels=data.max_pixels,
        max_skipped_share=data.max_skipped_share,
    )
    splits = _with_validation(decoded, share=data.validation_share, key=split_key)
    parts = {
        name: decoded.examples.select_units([unit for unit, split in enumerate(splits) if split == name])
        for name in SPLITS
    }
    return HospitalImages(
        train=parts[TRAIN],
        validation=parts[VALIDATION],
        test=parts[TEST],
        classes=decoded.classes,
        unit=decoded.unit,
        skipped=decoded.skipped,
        units_in_several_splits=decoded.units_in_several_splits,
        repeated_images=decoded.repeated_images,
        layout=decoded.layout,
    )


def _with_validation(decoded: DecodedRecords, *, share: float, key: bytes) -> tuple[str, ...]:
    """(num_units,) the split of each unit: as named, else train, less the share kept for validation."""
    splits = tuple(split or TRAIN for split in decoded.unit_splits)
    if not share or VALIDATION in splits:
        return splits
    kept_back = keyed_choice(decoded.examples.unit_ids, share=share, key=key)
    pairs = zip(splits, kept_back, strict=True)
    return tuple(VALIDATION if split == TRAIN and kept else split for split, kept in pairs)
