"""DICOM: one frame as a picture, with the rules by which a viewer shows it (docs/formats.md).

The order is that of PS3.4 N.2: modality values by rescale or Modality LUT, then the first VOI LUT or window,
then MONOCHROME1 turned round. What each transfer syntax is decoded by is fixed, so that two hospitals get the
same values from the same file.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.pixels.processing import apply_color_lut

from client.images import jpeg_plugin
from client.images.dicom_file import DicomFile, frame_dataset, parse_dicom
from client.images.records import SkipReason, Unusable, View
from common.intensities import Intensities, ShadeTable, Shown, Span, Window, kept_apart
from common.preprocessing import Picture

_PLUGINS: Final = {
    uid.JPEGBaseline8Bit: "pillow",
    **dict.fromkeys(jpeg_plugin.SYNTAXES, "imagecodecs"),
    **dict.fromkeys((uid.JPEGLSLossless, uid.JPEGLSNearLossless), "pyjpegls"),
    **dict.fromkeys((uid.JPEG2000Lossless, uid.JPEG2000), "pylibjpeg"),
    **dict.fromkeys((uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K), "pylibjpeg"),
    uid.RLELossless: "pydicom",  # slower than pylibjpeg-rle, which panics on damaged frames
}
_GROUPS: Final = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_MONOCHROME: Final = ("MONOCHROME1", "MONOCHROME2")
_CT: Final = (uid.CTImageStorage, uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage)
_SHOWN: Final = (*_MONOCHROME, "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def read_dicom(content: bytes, view: View, *, max_pixels: int, max_bytes: int) -> Picture:
    """One frame of a file. Raises Unusable, and whatever pydicom raises for damaged files."""
    file = parse_dicom(content, max_bytes=max_bytes)
    frame = 0
    if file.keyword:
        _check_coding(file)
        frame = view.frame_of(file.frames)
        _add_groups(file.header, frame)
    dataset, index = frame_dataset(file, frame, max_pixels=max_pixels)
    return _picture(dataset, *_decoded(dataset, file.syntax, index))


def _check_coding(file: DicomFile) -> None:
    """Raise Unusable for what no decoder is there for."""
    try:
        decoder = get_decoder(file.syntax)
    except NotImplementedError:
        raise Unusable(SkipReason.UNSUPPORTED) from None
    missing = file.syntax.is_compressed and _PLUGINS.get(file.syntax) not in decoder.available_plugins
    if missing or file.header.get("PhotometricInterpretation") not in _SHOWN:
        raise Unusable(SkipReason.UNSUPPORTED)


def _decoded(dataset: Dataset, syntax: uid.UID, index: int) -> tuple[NDArray[Any], str]:
    """Stored values (H, W) or (H, W, 3), YBR turned to RGB, and their photometric interpretation."""
    plugin = _PLUGINS.get(syntax, "")
    try:
        stored, meta = get_decoder(syntax).as_array(dataset, index=index, decoding_plugin=plugin)
    except (NotImplementedError, RuntimeError):
        # Single bits under RLE may end within a byte, which no decoder takes.
        unknown = dataset.BitsAllocated == 1
        raise Unusable(SkipReason.UNSUPPORTED if unknown else SkipReason.INCONSISTENT) from None
    return stored, str(meta["photometric_interpretation"])


def _picture(dataset: Dataset, stored: NDArray[Any], photometric: str) -> Picture:
    if photometric == "PALETTE COLOR" and stored.ndim == 2:
        return _palette(apply_color_lut(stored, dataset)[..., :3])
    bits = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if photometric in _MONOCHROME and stored.ndim == 2:
        return _grey(dataset, stored, bits, inverted=photometric == "MONOCHROME1")
    if photometric != "RGB" or stored.ndim != 3 or stored.shape[2] != 3:
        raise Unusable(SkipReason.UNSUPPORTED)
    if stored.dtype == np.uint8 and bits == 8:
        return Image.fromarray(np.ascontiguousarray(stored))
    return Intensities(values=kept_apart(stored, stored.dtype), shown=Span(low=0, high=2.0**bits - 1))


def _palette(colours: NDArray[Any]) -> Picture:
    """Colours of a palette (H, W, 3) of 8 or 16 bits; many write 8 bits into the upper byte of 16."""
    if colours.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(colours))
    if not (colours & 0xFF).any():
        return Image.fromarray(np.ascontiguousarray(colours >> 8).astype(np.uint8))
    return Intensities(values=kept_apart(colours, colours.dtype), shown=Span(low=0, high=65535))


def _grey(dataset: Dataset, stored: NDArray[Any], bits: int, *, inverted: bool) -> Picture:
    values = _modality(dataset, stored)
    shown = _voi(dataset)
    if shown is None:
        if values is stored and stored.dtype.kind == "u" and bits <= 8:
            if bits == 8 and stored.dtype == np.uint8 and not inverted:
                return Image.fromarray(np.ascontiguousarray(stored))
            shown = Span(low=0, high=2.0**bits - 1)
        else:
            exact = values.astype(np.float64)
            shown = Span.of(exact, without=_padding(dataset))
    return Intensities(
        values=kept_apart(values, stored.dtype),
        shown=shown,
        inverted=inverted,
        is_hounsfield=_is_hounsfield(dataset),
    )


def _modality(dataset: Dataset, stored: NDArray[Any]) -> NDArray[Any]:
    """Stored values in the modality's own units; the same array where nothing has to be done."""
    if dataset.get("ModalityLUTSequence"):
        first, outputs, _ = _table(dataset.ModalityLUTSequence[0], dataset)
        return outputs[np.clip(stored.astype(np.int64) - first, 0, len(outputs) - 1)]
    slope = _number(dataset, "RescaleSlope", 1.0)
    intercept = _number(dataset, "RescaleIntercept", 0.0)
    if (slope, intercept) == (1.0, 0.0):
        return stored
    return stored.astype(np.float64) * slope + intercept


def _is_hounsfield(dataset: Dataset) -> bool:
    """Whether rescaled values are Hounsfield units: said so, or of a CT image, PS3.3 C.8.2.1."""
    if dataset.get("ModalityLUTSequence") or "RescaleSlope" not in dataset:
        return False
    stated = str(dataset.get("RescaleType") or "").strip().upper()
    return stated == "HU" or (not stated and str(dataset.get("SOPClassUID") or "") in _CT)


def _voi(dataset: Dataset) -> Shown | None:
    """The first VOI LUT, else the first window that is one, else None."""
    if dataset.get("VOILUTSequence"):
        first, outputs, bits = _table(dataset.VOILUTSequence[0], dataset)
        return ShadeTable(first=first, outputs=(outputs / (2.0**bits - 1)).clip(0, 1).astype(np.float32))
    centre, width = _number(dataset, "WindowCenter", np.nan), _number(dataset, "WindowWidth", np.nan)
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function == "LINEAR" and "PixelData" not in dataset:
        function = "LINEAR_EXACT"  # LINEAR counts whole steps, which floats do not have
    if not np.isfinite(centre) or not np.isfinite(width) or width <= 0:
        return None
    if function == "SIGMOID":
        return Window(centre=centre, width=width, function="SIGMOID")
    if function == "LINEAR_EXACT":
        return Window(centre=centre, width=width, function="LINEAR_EXACT")
    return Window(centre=centre, width=width) if width >= 1 else None


def _table(item: Dataset, dataset: Dataset) -> tuple[int, NDArray[np.int64], int]:
    """(first value mapped, outputs, bits of an output) of a LUT item, PS3.3 C.11.1.1."""
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        little = bool(dataset.original_encoding[1])
        data = np.frombuffer(data, "<u2" if little else ">u2")
    outputs = np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
    entries = (entries & 0xFFFF) or 2**16
    if dataset.get("PixelRepresentation") == 1 and first >= 2**15:
        first -= 2**16
    if len(outputs) < entries or not 1 <= bits <= 16:
        raise Unusable(SkipReason.INCONSISTENT)
    return first, outputs[:entries], bits


def _padding(dataset: Dataset) -> tuple[float, float] | None:
    """Modality values that mark no picture, lowest and highest."""
    padding = _number(dataset, "PixelPaddingValue", np.nan)
    if not np.isfinite(padding):
        return None
    limit = _number(dataset, "PixelPaddingRangeLimit", padding)
    slope = _number(dataset, "RescaleSlope", 1.0)
    ends = [value * slope + _number(dataset, "RescaleIntercept", 0.0) for value in (padding, limit)]
    return min(ends), max(ends)


def _number(dataset: Dataset, keyword: str, otherwise: float) -> float:
    """The first value of an element."""
    value = dataset.get(keyword)
    if value is None or isinstance(value, str | bytes):
        return otherwise
    if hasattr(value, "__len__"):
        value = value[0] if len(value) else otherwise
    return float(value)


def _add_groups(header: Dataset, frame: int) -> None:
    """Move what an enhanced multi-frame file says of one frame, or of all, to where others say it."""
    for name, place in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        groups = header.get(name) or []
        if place >= len(groups):
            continue
        for keyword in _GROUPS:
            for item in list(groups[place].get(keyword) or [])[:1]:
                for element in item:
                    header[element.tag] = element
