"""The parts of a DICOM file that a picture needs: a few elements of the header and the bytes of one frame.

Names, dates, identifiers and private elements are skipped while parsing; nothing of a header is ever part of
an error, a log line or a file. Sizes are checked before anything is decoded.
"""

import io
import logging
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Final

import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.filereader import read_dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from client.images.codestream import bare_codestream, codestream_size
from client.images.records import SkipReason, Unusable

# What these libraries say about a file can quote its header.
for _name in ("pydicom", "pylibjpeg"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

WANTED: Final = [
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows"),
    *("Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue"),
    *("PixelPaddingRangeLimit", "WindowCenter", "WindowWidth", "VOILUTFunction", "RescaleIntercept"),
    *("RescaleSlope", "RescaleType", "ModalityLUTSequence", "VOILUTSequence", "PixelPresentation"),
    *(
        f"{part}{colour}PaletteColorLookupTable{what}"
        for colour in ("Red", "Green", "Blue")
        for part, what in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
    ),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"),
    *("SOPClassUID", "SeriesInstanceUID"),
]
"""All that is read of a header. The series' identifier only tells two series in one folder apart."""
DEFLATED: Final = b"1.2.840.10008.1.2.1.99"
_UNDEFINED: Final = 0xFFFFFFFF
_MOST_SWOLLEN: Final = 2
"""A coded frame is at most so many times larger than its samples would be in 64 bits."""
_PIXELS: Final = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}
_PIXEL_VRS: Final = (b"OB", b"OW", b"OF", b"OD", b"UN")
_ITEM: Final = b"\xfe\xff\x00\xe0"
_END: Final = b"\xfe\xff\xdd\xe0"


@dataclass(frozen=True)
class DicomFile:
    """A parsed header and where the pixels stand."""

    header: Dataset
    syntax: UID
    content: bytes
    """What the header was read from: the file, or what a deflated file holds."""
    keyword: str
    """Element of the pixels; empty where there is none."""
    vr: str
    start: int
    length: int
    """Of the pixels' value in `content`; `_UNDEFINED` for encapsulated frames."""

    @property
    def frames(self) -> int:
        """Number of frames, at least 1."""
        return max(1, int(self.header.get("NumberOfFrames") or 1))


def parse_dicom(content: bytes, *, max_bytes: int) -> DicomFile:
    """Read the header. Raises Unusable, and what pydicom raises for damaged ones."""
    content = inflated(content, max_bytes=max_bytes)
    stream = io.BytesIO(content)
    header = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=list(WANTED))
    implicit, little = header.original_encoding
    syntax = header.file_meta.get("TransferSyntaxUID")
    if not syntax:
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        syntax = ImplicitVRLittleEndian if implicit else explicit
    keyword, vr, start, length = _pixel_element(content, stream.tell(), "<" if little else ">")
    return DicomFile(header, UID(syntax), content, keyword, vr, start, length)


def frame_dataset(file: DicomFile, frame: int, *, max_pixels: int) -> tuple[Dataset, int]:
    """A dataset that pydicom decodes, and the frame's place in it. Changes the header.

    Raises Unusable where sizes are absurd, the file has no pixels, ends too early or contradicts itself.
    """
    header = file.header
    _check_sizes(file, max_pixels=max_pixels)
    header.file_meta.TransferSyntaxUID = file.syntax
    if not file.syntax.is_compressed:
        if file.length == _UNDEFINED:
            raise Unusable(SkipReason.INCONSISTENT)
        return _native_frame(file, frame)
    if file.length != _UNDEFINED:
        raise Unusable(SkipReason.INCONSISTENT)
    data = bare_codestream(_one_frame(file, frame))
    if data is None:
        raise Unusable(SkipReason.INCONSISTENT)
    size = codestream_size(data)
    swollen = len(data) > _MOST_SWOLLEN * header.Rows * header.Columns * header.SamplesPerPixel * 8 + 2**16
    if swollen or (size is not None and size != (header.Rows, header.Columns, header.SamplesPerPixel)):
        raise Unusable(SkipReason.INCONSISTENT)
    header.PixelData = encapsulate([data])
    header["PixelData"].VR = "OB"
    header["PixelData"].is_undefined_length = True
    header.NumberOfFrames = 1
    for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if name in header:
            delattr(header, name)
    return header, 0


def _check_sizes(file: DicomFile, *, max_pixels: int) -> None:
    header = file.header
    if not file.keyword:
        sop_class = UID(header.get("SOPClassUID") or "").name
        begun = "Rows" in header or "Image Storage" in sop_class
        raise Unusable(SkipReason.TRUNCATED if begun else SkipReason.NO_PIXELS)
    rows, columns = header.get("Rows"), header.get("Columns")
    if not isinstance(rows, int) or not isinstance(columns, int) or rows < 1 or columns < 1:
        raise Unusable(SkipReason.INCONSISTENT)
    if rows * columns > max_pixels:
        raise Unusable(SkipReason.OVERSIZED)
    if header.get("BitsAllocated") not in (1, 8, 16, 32, 64) or header.get("SamplesPerPixel") not in (1, 3):
        raise Unusable(SkipReason.INCONSISTENT)


def _native_frame(file: DicomFile, frame: int) -> tuple[Dataset, int]:
    """The dataset with one frame's bytes, or all of them where frames share a byte."""
    header = file.header
    samples = 2 if header.PhotometricInterpretation == "YBR_FULL_422" else header.SamplesPerPixel
    bits = header.Rows * header.Columns * samples * header.BitsAllocated
    if min(file.length, len(file.content) - file.start) < (bits * file.frames + 7) // 8:
        raise Unusable(SkipReason.TRUNCATED)
    start, length = file.start, file.length
    # Bytes of OW come in pairs, swapped in big-endian files: a frame of odd length has no bytes of its own.
    if bits % 16 == 0:
        start, length = file.start + frame * bits // 8, bits // 8
        header.NumberOfFrames, frame = 1, 0
    setattr(header, file.keyword, file.content[start : start + length])
    header[file.keyword].VR = file.vr
    return header, frame


def _one_frame(file: DicomFile, frame: int) -> bytes:
    """The coded bytes of one frame, its fragments joined."""
    value, fragments = _encapsulated(file.content, file.start)
    if fragments < file.frames:
        raise Unusable(SkipReason.TRUNCATED)
    offsets = None
    if "ExtendedOffsetTable" in file.header and "ExtendedOffsetTableLengths" in file.header:
        offsets = (file.header.ExtendedOffsetTable, file.header.ExtendedOffsetTableLengths)
    data: bytes = get_frame(value, frame, extended_offsets=offsets, number_of_frames=file.frames)
    return data


def _encapsulated(content: bytes, start: int) -> tuple[bytes, int]:
    """Offset table and fragments up to the delimiter, and how many fragments; by the items' own lengths.

    A search for the delimiter would stop at one inside a coded picture.
    """
    place, items = start, 0
    while content[place : place + 4] == _ITEM:
        (length,) = struct.unpack_from("<L", content, place + 4)
        place += 8 + length
        items += 1
        if place > len(content):
            raise Unusable(SkipReason.TRUNCATED)
    if content[place : place + 4] != _END and place + 8 < len(content):
        raise Unusable(SkipReason.INCONSISTENT)
    return content[start:place], items - 1


def _pixel_element(content: bytes, place: int, order: str) -> tuple[str, str, int, int]:
    """(keyword, VR, start, length) of the pixels' element at `place`; no keyword where none is.

    Whether the VR is stated is seen here: some files contradict their transfer syntax. Read as a length, a VR
    would be odd, and lengths are even.
    """
    if len(content) < place + 12:
        return "", "", len(content), 0
    group, element = struct.unpack_from(f"{order}HH", content, place)
    keyword = _PIXELS.get(group << 16 | element, "")
    vr = content[place + 4 : place + 6]
    stated = vr in _PIXEL_VRS
    start = place + (12 if stated else 8)
    (length,) = struct.unpack_from(f"{order}L", content, start - 4)
    return keyword, vr.decode() if stated and vr != b"UN" else "OW", start, length


def inflated(content: bytes, *, max_bytes: int) -> bytes:
    """The data set of a deflated file, without what stands before it; others as they are. Raises Unusable."""
    if DEFLATED not in content[:1024]:
        return content
    stream = io.BytesIO(content)
    stream.seek(132 if content[128:132] == b"DICM" else 0)
    meta = read_dataset(stream, False, True, stop_when=_after_meta)
    if meta.get("TransferSyntaxUID") != DEFLATED.decode():
        return content
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        unpacked = inflater.decompress(content[stream.tell() :], max_bytes)
    except zlib.error:
        raise Unusable(SkipReason.INCONSISTENT) from None
    if inflater.unconsumed_tail:
        raise Unusable(SkipReason.OVERSIZED)
    if not inflater.eof:
        raise Unusable(SkipReason.TRUNCATED)
    return unpacked


def _after_meta(tag: Any, _vr: str | None, _length: int) -> bool:
    return bool(tag.group != 2)
