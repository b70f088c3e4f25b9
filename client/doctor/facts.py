"""What a file says of itself beside its pixels; words that the standard defines, numbers, never free text.

Only the doctor reads these parts of a header: training and prediction skip them (`client.images.dicom_file`).
A value that is not among the defined words becomes `other`, so that nothing a person typed gets out of here.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from PIL import ExifTags, Image

from client.images.content import HEAD_BYTES, Format, format_of, unzipped
from client.images.decode import read_content
from client.images.entries import files_of
from client.images.formats import most_bytes

_VIEWS: Final = frozenset(
    ["AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO", "LAT", "CC", "MLO", "ML", "LM"]
)
_LATERAL: Final = frozenset(["LL", "RL", "LAT"])
_MODALITIES: Final = frozenset(
    ["CR", "CT", "DX", "ES", "GM", "IO", "IVUS", "MG", "MR", "NM", "OCT", "OP", "OPT", "OT", "PT", "PX", "RF"]
    + ["RTDOSE", "RTIMAGE", "SC", "SEG", "SM", "US", "XA", "XC"]
)
_PHOTOMETRIC: Final = frozenset(
    ["MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"]
)
_DIRECTIONS: Final = re.compile(r"[AFHLPR]{1,3}")
_SPACINGS: Final = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
_CAPTURES: Final = ("WSD", "DV", "SD", "DF")
"""ConversionType: workstation, digitised video, scanned document, digitised film."""
_EXIF: Final = {
    tag.value: tag.name
    for tag in (
        *(ExifTags.Base.ImageDescription, ExifTags.Base.Artist, ExifTags.Base.Copyright),
        *(ExifTags.Base.XPTitle, ExifTags.Base.XPComment, ExifTags.Base.XPAuthor, ExifTags.Base.XPSubject),
        *(ExifTags.Base.XPKeywords, ExifTags.Base.UserComment, ExifTags.Base.CameraOwnerName),
        ExifTags.Base.GPSInfo,
    )
}
_BITS: Final = {"1": 1, "I;16": 16, "I;16B": 16, "I;16L": 16, "I": 32, "F": 32}


class SliceNumber(NamedTuple):
    """What a slice says of its place in its series."""

    series: str
    """Digest of the series' identifier; empty where none is stated."""
    instance: int | None
    in_acquisition: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Of one file, or of the first slice of a series."""

    format: str
    width: int = 0
    height: int = 0
    """Stored; 0 where unknown."""
    bits: int = 0
    colours: str = ""
    """Photometric interpretation, or Pillow's mode."""
    spacing: tuple[float, float] | None = None
    """Millimetres between rows and between columns."""
    exif_orientation: int = 1
    view: str = ""
    directions: str = ""
    """PatientOrientation: where rows and columns lead."""
    modality: str = ""
    annotated: str = ""
    """Why something may be written in the picture; empty without a sign of it."""
    says_annotated: bool = False
    """Whether BurnedInAnnotation is YES."""
    recognizable: bool = False
    direct: frozenset[str] = frozenset()
    """Identifying attributes that hold a value, by keyword."""
    others: frozenset[str] = frozenset()
    """Further attributes of the profile, and free text in other formats."""
    deidentified: bool = False
    """Whether PatientIdentityRemoved is YES."""
    is_named: bool = False
    """Whether the file's path holds a part of its own patient's name, number or birth date."""
    slices: tuple[SliceNumber, ...] = field(default=())

    @property
    def is_lateral(self) -> bool:
        """Whether ViewPosition says that the film was taken from the side."""
        return self.view in _LATERAL


def read_facts(path: str, *, max_pixels: int) -> Facts:
    """Facts of an entry, from headers only; what cannot be read is left out. Raises Unusable, no more."""
    files = files_of(path)
    if not os.path.isdir(path):
        return _of_file(files[0], max_pixels=max_pixels)
    every = [facts for facts in (_of_file(file, max_pixels=max_pixels) for file in files) if facts.slices]
    if not every:
        return Facts(format=Format.UNKNOWN)
    first = every[0]
    joined = {name: getattr(first, name) for name in Facts.__slots__}
    joined["slices"] = tuple(number for facts in every for number in facts.slices)
    joined["direct"] = frozenset().union(*(facts.direct for facts in every))
    joined["others"] = frozenset().union(*(facts.others for facts in every))
    joined["is_named"] = any(facts.is_named for facts in every)
    joined["deidentified"] = all(facts.deidentified for facts in every)
    return Facts(**joined)


def _of_file(path: str, *, max_pixels: int) -> Facts:
    format = Format.UNKNOWN
    try:
        with open(path, "rb") as file:
            format = format_of(file.read(HEAD_BYTES))
        if format is Format.DICOM:
            return _of_dicom(path, max_pixels=max_pixels)
        if format is Format.NIFTI:
            return _of_nifti(path)
        if format is not Format.UNKNOWN:
            return _of_picture(path, format)
    except Exception:  # a header that a parser does not like; its words may be the patient's
        pass
    return Facts(format=format)


def _of_dicom(path: str, *, max_pixels: int) -> Facts:
    import pydicom

    from client.doctor.profile import direct_words, filled_in
    from client.images.dicom_file import DEFLATED, inflated

    with open(path, "rb") as file:
        stream: Any = file
        if DEFLATED in file.read(1024):
            content = read_content(path, max_pixels=max_pixels)
            stream = io.BytesIO(inflated(content, max_bytes=most_bytes(max_pixels)))
        stream.seek(0)
        header = pydicom.dcmread(stream, stop_before_pixels=True, force=True)
    direct, others = filled_in(header)
    shown = os.path.basename(path).casefold() + os.path.basename(os.path.dirname(path)).casefold()
    says, why = _annotation(header)
    is_deidentified = _is_yes(header, "PatientIdentityRemoved")
    return Facts(
        format=Format.DICOM,
        width=_whole(header.get("Columns")) or 0,
        height=_whole(header.get("Rows")) or 0,
        bits=_whole(header.get("BitsStored") or header.get("BitsAllocated")) or 0,
        colours=_word(header, "PhotometricInterpretation", _PHOTOMETRIC),
        spacing=_spacing(header),
        view=_word(header, "ViewPosition", _VIEWS),
        directions=_patient_orientation(header),
        modality=_word(header, "Modality", _MODALITIES),
        annotated=why,
        says_annotated=says,
        recognizable=_is_yes(header, "RecognizableVisualFeatures"),
        direct=frozenset(direct),
        others=frozenset(others),
        deidentified=is_deidentified,
        is_named=not is_deidentified and any(word.casefold() in shown for word in direct_words(header)),
        slices=(
            SliceNumber(
                _digest(header.get("SeriesInstanceUID")),
                _whole(header.get("InstanceNumber")),
                _whole(header.get("ImagesInAcquisition")),
            ),
        ),
    )


def _annotation(header: Any) -> tuple[bool, str]:
    """(BurnedInAnnotation is YES, the sign that words are in the picture)."""
    if _is_yes(header, "BurnedInAnnotation"):
        return True, "BurnedInAnnotation is YES"
    if str(header.get("BurnedInAnnotation") or "").strip().upper() == "NO":
        return False, ""
    if "SCREEN SAVE" in [str(word).strip().upper() for word in _several(header.get("ImageType"))]:
        return False, "screen capture"
    if str(header.get("ConversionType") or "").strip().upper() in _CAPTURES:
        return False, "digitised or captured"
    if str(header.get("SOPClassUID") or "").startswith("1.2.840.10008.5.1.4.1.1.7"):
        return False, "secondary capture"
    return False, "ultrasound" if header.get("Modality") in ("US", "IVUS") else ""


def _spacing(header: Any) -> tuple[float, float] | None:
    for keyword in _SPACINGS:
        if found := _pair(header.get(keyword)):
            return found
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for item in list(header.get(groups) or [])[:1]:
            for measures in list(item.get("PixelMeasuresSequence") or [])[:1]:
                if found := _pair(measures.get("PixelSpacing")):
                    return found
    return None


def _patient_orientation(header: Any) -> str:
    words = [str(word).strip() for word in _several(header.get("PatientOrientation"))]
    if not any(words):
        return ""
    return "\\".join(words) if all(_DIRECTIONS.fullmatch(word) for word in words) else "other"


def _digest(value: Any) -> str:
    return hashlib.sha256(str(value).encode()).hexdigest()[:16] if value else ""


def _word(header: Any, keyword: str, defined: frozenset[str]) -> str:
    value = str(header.get(keyword) or "").strip().upper()
    return value if not value or value in defined else "other"


def _is_yes(header: Any, keyword: str) -> bool:
    return str(header.get(keyword) or "").strip().upper() == "YES"


def _several(value: Any) -> Iterable[Any]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def _whole(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _pair(value: Any) -> tuple[float, float] | None:
    try:
        rows, columns = (float(number) for number in value)
    except (TypeError, ValueError):
        return None
    return (rows, columns) if 0 < rows < 1e4 and 0 < columns < 1e4 else None


def _of_nifti(path: str) -> Facts:
    import nibabel
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import io_orientation

    with open(path, "rb") as file:
        begun = unzipped(file.read(2 * HEAD_BYTES))
    kind = nibabel.Nifti2Header if 540 in {int.from_bytes(begun[:4], o) for o in ("little", "big")} else None
    header: Any = (kind or nibabel.Nifti1Header).from_fileobj(io.BytesIO(begun), check=False)
    affine = header.get_best_affine()
    axes = [int(axis) for axis, _ in io_orientation(affine)]
    sizes = {axis: float(size) for axis, size in zip(axes, voxel_sizes(affine), strict=True)}
    sides = dict(zip(axes, [*(int(side) for side in header.get_data_shape()), 1, 1], strict=False))
    scale = {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0)
    texts = {"NIfTI descrip": header["descrip"], "NIfTI aux_file": header["aux_file"]}
    if "db_name" in header:
        texts["NIfTI db_name"] = header["db_name"]
    return Facts(
        format=Format.NIFTI,
        width=sides[0],
        height=sides[1],
        bits=header.get_data_dtype().itemsize * 8,
        colours="volume",
        spacing=_pair((sizes[1] * scale, sizes[0] * scale)),
        others=frozenset(name for name, text in texts.items() if bytes(text).strip(b"\0 ")),
    )


def _of_picture(path: str, format: Format) -> Facts:
    with Image.open(path) as image:
        exif = image.getexif()
        found = {f"EXIF {name}" for tag, name in _EXIF.items() if exif.get(tag)}
        found |= {f"EXIF {name}" for tag, name in _EXIF.items() if exif.get_ifd(ExifTags.IFD.Exif).get(tag)}
        texts = getattr(image, "text", None) if format is not Format.PNG else image.info
        free = ("comment", "Comment", "Description", "Title", "Author", "XML:com.adobe.xmp", "xmp")
        found |= {f"{format} {name.split('.')[-1]}" for name in free if (texts or image.info).get(name)}
        bits = _BITS.get(image.mode, 8)
        if format is Format.PNG and image.mode in ("RGB", "RGBA", "LA") and _png_depth(path) == 16:
            bits = 16
        return Facts(
            format=format,
            width=image.width,
            height=image.height,
            bits=bits,
            colours=image.mode,
            exif_orientation=int(exif.get(ExifTags.Base.Orientation, 1) or 1),
            others=frozenset(found),
        )


def _png_depth(path: str) -> int:
    with open(path, "rb") as file:
        return file.read(25)[24]
