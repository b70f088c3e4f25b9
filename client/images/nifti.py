"""NIfTI-1 and NIfTI-2: one axial slice of one volume as a picture (docs/formats.md).

Voxels are turned to the closest canonical axes (right, anterior, superior) and shown as radiology does:
anterior at the top, the patient's right at the left. Nothing is decompressed beyond the volume that is asked
for, and no volume that the limit does not allow.
"""

import io
import logging
import zlib
from math import prod
from typing import Any, Final

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from PIL import Image

from client.images.content import is_gzip, is_nifti, is_nifti_pair, unzipped
from client.images.records import SkipReason, Unusable, View
from common.intensities import Intensities, Span, kept_apart
from common.preprocessing import Picture

logging.getLogger("nibabel").setLevel(logging.CRITICAL + 1)  # its lines can quote a header
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)

_LOOKED_AT: Final = 2**22
"""Voxels of a volume that its range is taken from: every second, third ... of a larger one."""


def read_nifti(
    content: bytes, view: View, *, max_pixels: int, max_bytes: int, voxels: bytes | None = None
) -> Picture:
    """One slice of a file, or of a pair whose second file is `voxels`.

    Raises Unusable, and whatever nibabel raises for damaged headers.
    """
    header = _header(content)
    alone = voxels is None
    if alone and is_nifti_pair(unzipped(content[:2048])):
        raise Unusable(SkipReason.MISSING)
    dtype = _dtype(header)
    shape, volumes = _shape(header)
    if max(shape[0] * shape[1], shape[0] * shape[2], shape[1] * shape[2]) > max_pixels:
        raise Unusable(SkipReason.OVERSIZED)
    volume_bytes = prod(shape) * dtype.itemsize
    start = _offset(header) + view.volume_of(volumes) * volume_bytes
    if start + volume_bytes > max_bytes:
        raise Unusable(SkipReason.OVERSIZED)
    stored = content if alone or voxels is None else voxels
    if not is_gzip(stored) and len(stored) < _offset(header) + volumes * volume_bytes:
        raise Unusable(SkipReason.TRUNCATED)
    data = _unzipped(stored, start + volume_bytes)
    volume: NDArray[Any] = np.ndarray(shape, dtype, data, start, order="F")
    turned = apply_orientation(volume, _orientation(header))
    picture = turned[:, :, view.frame_of(turned.shape[2])].T[::-1, ::-1]
    if dtype.names:
        return Image.fromarray(np.stack([picture[name] for name in ("R", "G", "B")], axis=-1))
    slope, intercept = header.get_slope_inter()
    values = kept_apart(_scaled(picture, slope, intercept), dtype)
    return Intensities(values=values, shown=_shown(header, volume, slope, intercept))


def count_slices(content: bytes) -> int:
    """Axial slices of a file's volumes, as `read_nifti` numbers them. Raises as it does."""
    header = _header(content)
    shape, _ = _shape(header)
    axes = _orientation(header)[:, 0].tolist()
    return shape[axes.index(2.0)]


def _header(content: bytes) -> Any:
    begun = unzipped(content[:4096])[:1024]
    if not is_nifti(begun):
        raise Unusable(SkipReason.UNREADABLE)
    second = 540 in (int.from_bytes(begun[:4], "little"), int.from_bytes(begun[:4], "big"))
    kind = nibabel.Nifti2Header if second else nibabel.Nifti1Header
    if len(begun) < (540 if second else 348):
        raise Unusable(SkipReason.TRUNCATED)
    return kind.from_fileobj(io.BytesIO(begun), check=False)


def _dtype(header: Any) -> np.dtype[Any]:
    """Of a voxel. Raises Unusable for complex and unknown ones."""
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        raise Unusable(SkipReason.UNSUPPORTED) from None
    colour = dtype.names is not None and set("RGB") <= set(dtype.names)
    if not colour and (dtype.kind not in "iuf" or dtype.itemsize > 8):
        raise Unusable(SkipReason.UNSUPPORTED)
    return dtype


def _shape(header: Any) -> tuple[tuple[int, int, int], int]:
    """(x, y, z) as stored, and the number of volumes."""
    try:
        sides = [int(side) for side in header.get_data_shape()]
    except (HeaderDataError, ValueError):
        raise Unusable(SkipReason.INCONSISTENT) from None
    if len(sides) < 2 or min(sides) < 1:
        raise Unusable(SkipReason.INCONSISTENT)
    x, y, z = [*sides, 1][:3]
    return (x, y, z), prod(sides[3:])


def _offset(header: Any) -> int:
    offset = float(header["vox_offset"])
    if not np.isfinite(offset) or offset < 0:
        raise Unusable(SkipReason.INCONSISTENT)
    return int(offset)


def _unzipped(stored: bytes, needed: int) -> bytes:
    """The first `needed` bytes. Raises Unusable where there are not so many."""
    if not is_gzip(stored):
        return stored
    inflated = bytearray()
    while stored and len(inflated) < needed:  # a gzip file may have several members
        inflater = zlib.decompressobj(wbits=31)
        try:
            inflated += inflater.decompress(stored, needed - len(inflated))
        except zlib.error:
            raise Unusable(SkipReason.INCONSISTENT) from None
        stored = inflater.unused_data if inflater.eof else b""
    if len(inflated) < needed:
        raise Unusable(SkipReason.TRUNCATED)
    return bytes(inflated)


def _orientation(header: Any) -> NDArray[np.float64]:
    """(3, 2) nibabel's orientation; an axis without a direction takes the place that is left."""
    affine = np.asarray(header.get_best_affine(), np.float64)
    if not np.isfinite(affine).all():
        raise Unusable(SkipReason.INCONSISTENT)
    orientation: NDArray[np.float64] = io_orientation(affine)
    left = sorted({0.0, 1.0, 2.0} - set(orientation[:, 0]))
    for axis in np.flatnonzero(np.isnan(orientation[:, 0])):
        orientation[axis] = (left.pop(0), 1.0)
    return orientation


def _scaled(values: NDArray[Any], slope: float | None, intercept: float | None) -> NDArray[np.float64]:
    """Stored voxels in the file's units; float64 of the same shape."""
    scaled: NDArray[np.float64] = values.astype(np.float64)
    if slope is not None:
        scaled = scaled * slope + (intercept or 0.0)
    return scaled


def _shown(header: Any, volume: NDArray[Any], slope: float | None, intercept: float | None) -> Span:
    """The range that the header names (cal_min, cal_max), else the quantiles of the whole volume."""
    low, high = float(header["cal_min"]), float(header["cal_max"])
    if np.isfinite(low) and np.isfinite(high) and high > low:
        return Span(low=low, high=high)
    seen = volume.ravel(order="F")[:: -(-volume.size // _LOOKED_AT)]
    return Span.of(_scaled(seen, slope, intercept))
