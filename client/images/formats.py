"""One reader for all formats: a file's content to the picture that training and prediction see."""

import io
from typing import Final

from PIL import Image, UnidentifiedImageError

from client.images.content import HEAD_BYTES, Format, format_of
from client.images.records import SkipReason, Unusable, View
from common.preprocessing import Picture

MOST_BYTES_PER_PIXEL: Final = 8
"""RGBA of 16 bits, or a float64."""


def most_bytes(max_pixels: int) -> int:
    """Largest file, and largest content of a compressed one, that is taken into memory."""
    return max_pixels * MOST_BYTES_PER_PIXEL + 2**20


def count_frames(content: bytes, *, max_pixels: int) -> int:
    """Pictures in a file (of a NIfTI pair its header): frames, or slices of a volume. Raises Unusable."""
    format = format_of(content[:HEAD_BYTES])
    try:
        if format is Format.DICOM:
            from client.images.dicom_file import parse_dicom

            return max(1, parse_dicom(content, max_bytes=most_bytes(max_pixels)).frames)
        if format is Format.NIFTI:
            from client.images.nifti import count_slices

            return count_slices(content)
        with Image.open(io.BytesIO(content)) as image:
            return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    except Unusable:
        raise
    except Exception:
        raise Unusable(SkipReason.INCONSISTENT) from None


def open_picture(content: bytes, view: View, *, max_pixels: int, voxels: bytes | None = None) -> Picture:
    """One picture of a file's bytes; `voxels` is the second file of a NIfTI pair.

    Inside `guarded_pillow`. Raises Unusable, and nothing else: damaged files make parsers raise almost
    anything (struct.error, KeyError, zlib.error, RecursionError ...).
    """
    format = format_of(content[:HEAD_BYTES])
    try:
        if format is Format.DICOM:
            from client.images.dicom import read_dicom

            return read_dicom(content, view, max_pixels=max_pixels, max_bytes=most_bytes(max_pixels))
        if format is Format.NIFTI:
            from client.images.nifti import read_nifti

            limit = most_bytes(max_pixels)
            return read_nifti(content, view, max_pixels=max_pixels, max_bytes=limit, voxels=voxels)
        from client.images.pictures import read_picture

        return read_picture(content, view, max_pixels=max_pixels)
    except Unusable:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Unusable(SkipReason.OVERSIZED) from None
    except UnidentifiedImageError:
        raise Unusable(SkipReason.UNREADABLE) from None
    except Exception as error:
        if format in (Format.DICOM, Format.NIFTI):
            raise Unusable(SkipReason.INCONSISTENT) from None
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise Unusable(SkipReason.TRUNCATED if cut else SkipReason.UNREADABLE) from None
