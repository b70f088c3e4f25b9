"""A folder of DICOM slices as one series, ordered by where the slices lie.

A slice's place is its position (ImagePositionPatient) along the normal of its plane
(ImageOrientationPatient); names of files and instance numbers say nothing. Gaps and slices at one place are
refused, since the slice that a person or the default rule picks would be another one.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np

from client.images.dicom_file import DicomFile
from client.images.records import SkipReason, Unusable

_SAME_PLACE_MM: Final = 0.01
_SAME_DIRECTION: Final = 1e-3
_GAP: Final = 1.5
"""A gap is this much wider than both its neighbours ..."""
_THICKER: Final = 1.25
"""... or than one neighbour or the median, and then this much wider than a slice is thick."""


class Slice(NamedTuple):
    """Where one file's picture lies; lengths in mm."""

    path: str
    series: str
    size: tuple[int, int]
    normal: tuple[float, float, float]
    place: float
    """Along the normal."""
    thickness: float
    """0 where it is not stated."""


def slice_of(path: str, file: DicomFile) -> Slice | None:
    """Where a parsed file lies; None where it has no picture. Raises Unusable without a position."""
    header = file.header
    if not file.keyword:
        return None
    position, orientation = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    if not position or not orientation or len(position) != 3 or len(orientation) != 6:
        raise Unusable(SkipReason.INCONSISTENT)
    if file.frames > 1:
        raise Unusable(SkipReason.SEVERAL_SERIES)
    axes = np.array([float(value) for value in orientation]).reshape(2, 3)
    normal = np.cross(axes[0], axes[1])
    length = float(np.linalg.norm(normal))
    if not np.isfinite(length) or length < _SAME_DIRECTION:
        raise Unusable(SkipReason.INCONSISTENT)
    normal = normal / length
    return Slice(
        path=path,
        series=str(header.get("SeriesInstanceUID") or ""),
        size=(int(header.Rows), int(header.Columns)),
        normal=(float(normal[0]), float(normal[1]), float(normal[2])),
        place=float(normal @ np.array([float(value) for value in position])),
        thickness=_positive(header.get("SliceThickness")),
    )


def in_order(slices: Sequence[Slice]) -> list[str]:
    """Paths from one end to the other. Raises Unusable for what is not one whole series."""
    first = slices[0]
    for other in slices:
        turned = np.abs(np.subtract(first.normal, other.normal)).max() > _SAME_DIRECTION
        if turned or (other.series, other.size) != (first.series, first.size):
            raise Unusable(SkipReason.SEVERAL_SERIES)
    ordered = sorted(slices, key=lambda entry: (entry.place, entry.path))
    gaps = [after.place - before.place for before, after in zip(ordered, ordered[1:], strict=False)]
    if not np.isfinite([entry.place for entry in ordered]).all():
        raise Unusable(SkipReason.INCONSISTENT)
    if any(gap < _SAME_PLACE_MM for gap in gaps):
        raise Unusable(SkipReason.REPEATED_SLICES)
    if any(_is_missing(gaps, place, ordered) for place in range(len(gaps))):
        raise Unusable(SkipReason.MISSING_SLICES)
    return [entry.path for entry in ordered]


def _is_missing(gaps: Sequence[float], place: int, ordered: Sequence[Slice]) -> bool:
    """Whether a slice is missing in one gap; unequal spacing alone, as of a head CT, is no gap."""
    gap, beside = gaps[place], [gaps[near] for near in (place - 1, place + 1) if 0 <= near < len(gaps)]
    wider = bool(beside) and gap > _GAP * max(beside)
    if wider and len(beside) == 2:
        return True
    thickness = max(ordered[place].thickness, ordered[place + 1].thickness)
    return thickness > 0 and gap > _THICKER * thickness and (wider or gap > _GAP * median(gaps))


def _positive(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if np.isfinite(number) and number > 0 else 0.0
