"""What a file is, by its first bytes; its name says nothing."""

import zlib
from enum import StrEnum
from typing import Final, Literal

HEAD_BYTES: Final = 2048
"""How much of a file `format_of` wants to see."""


class Format(StrEnum):
    """Formats that are read, as a person calls them."""

    DICOM = "DICOM"
    NIFTI = "NIfTI"
    PNG = "PNG"
    JPEG = "JPEG"
    TIFF = "TIFF"
    JPEG_2000 = "JPEG 2000"
    BMP = "BMP"
    GIF = "GIF"
    WEBP = "WebP"
    PNM = "PNM"
    UNKNOWN = "unknown"


_BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": Format.PNG,
    b"\xff\xd8\xff": Format.JPEG,
    b"II*\0": Format.TIFF,
    b"MM\0*": Format.TIFF,
    b"II+\0": Format.TIFF,
    b"MM\0+": Format.TIFF,
    b"\0\0\0\x0cjP  \r\n\x87\n": Format.JPEG_2000,
    b"\xff\x4f\xff\x51": Format.JPEG_2000,
    b"GIF8": Format.GIF,
    b"BM": Format.BMP,
    **{b"P%d" % number: Format.PNM for number in range(1, 7)},
}
_VRS = frozenset(b"AE AS AT CS DA DS DT IS LO LT OB OF OW PN SH SL SQ SS ST TM UI UL UN US UT".split())


def format_of(head: bytes) -> Format:
    """Format of a file that begins with `head` (its first HEAD_BYTES, or all of a shorter one)."""
    if head[128:132] == b"DICM":
        return Format.DICOM  # also a slide whose 128 free bytes are a TIFF's beginning
    for beginning, format in _BEGINNINGS.items():
        if head.startswith(beginning):
            return format
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Format.WEBP
    if is_nifti(unzipped(head)):
        return Format.NIFTI
    return Format.DICOM if _is_bare_dicom(head) else Format.UNKNOWN


def is_gzip(content: bytes) -> bool:
    """Whether the content is compressed by gzip."""
    return content[:3] == b"\x1f\x8b\x08"


def unzipped(head: bytes) -> bytes:
    """The first bytes inside a gzip file; what is none stays as it is."""
    if not is_gzip(head):
        return head
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def is_nifti(head: bytes) -> bool:
    """Whether uncompressed bytes begin a NIfTI-1 or NIfTI-2 file, or the header of a pair."""
    size = head[:4]
    if size in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):
        return head[344:348] in (b"n+1\0", b"ni1\0")
    return size in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") and head[4:8] in (b"n+2\0", b"ni2\0")


def is_nifti_pair(head: bytes) -> bool:
    """Whether a NIfTI header stands alone, its voxels in another file."""
    return is_nifti(head) and (head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0")


def _is_bare_dicom(head: bytes) -> bool:
    """Whether the content may be DICOM without preamble: it begins with an element of group 2 or 8."""
    if len(head) < 16 or head[:2] not in (b"\x02\0", b"\x08\0", b"\0\x08"):
        return False
    if bytes(head[4:6]) in _VRS:
        return True
    order: Literal["big", "little"] = "big" if head[:2] == b"\0\x08" else "little"
    # Without a VR: the number of an element that files begin with, and a length that such elements have.
    element, length = int.from_bytes(head[2:4], order), int.from_bytes(head[4:8], order)
    return element <= 0x0080 and length <= 256
