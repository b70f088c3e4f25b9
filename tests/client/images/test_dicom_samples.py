"""The real DICOM files, against what plain pydicom gives by hand."""

import csv
import hashlib
import re
import warnings

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.uid import ImplicitVRLittleEndian

from client.images.content import HEAD_BYTES, Format, format_of
from client.images.records import SkipReason, View
from common.intensities import Intensities
from tests.client.images.medical_files import opened

LARGEST = 4_000_000
BROKEN = {
    "JPEG2000-embedded-sequence-delimiter.dcm": SkipReason.INCONSISTENT,  # its picture was overwritten
    "MR_truncated.dcm": SkipReason.TRUNCATED,
    "badVR.dcm": SkipReason.INCONSISTENT,  # '1A' frames
    "liver_nonbyte_aligned_rle.dcm": SkipReason.UNSUPPORTED,
    "no_meta.dcm": SkipReason.UNREADABLE,  # begins in the middle of an element
}
WITHOUT_PICTURE = (
    *("ExplVR_BigEndNoMeta", "ExplVR_LitEndNoMeta", "UN_sequence", "empty_charset_LEI"),
    *("meta_missing_tsyntax", "nested_priv_SQ", "no_meta_group_length", "priv_SQ", "reportsi"),
    *("reportsi_with_empty_number_tags", "rtplan", "rtplan_truncated", "rtstruct", "test-SR"),
)
BETTER_THAN_THE_INDEX = {"JPEG-lossy.dcm", "OT-PAL-8-face.dcm", "emri_small_jpeg_2k_lossless_too_short.dcm"}
"""What pydicom 3.0 with its own plugins fails at, and viewers do not."""
LOSSLESS_JPEG = {
    "SC_rgb_jpeg_gdcm.dcm": "169e6195",
    "JPEG-LL.dcm": "a6e9d321",
    "JPGLosslessP14SV1_1s_1f_8b.dcm": "36e27e4f",
    "bad_sequence.dcm": "ef7120dd",
}
"""SHA-256 of the stored values as GDCM 3.2.6 and pylibjpeg-libjpeg 2.5.0 decode them, which agree."""


@pytest.fixture(autouse=True)
def quiet():
    """pydicom, used by hand, warns about the broken files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def samples(shared_data):
    with (shared_data / "dicom_samples" / "index.csv").open() as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    return {name: (shared_data / "dicom_samples" / name, row) for name, row in rows.items()}


def by_hand(path, frame):
    """(stored values of a frame, dataset with that frame's own rescale and window)."""
    dataset = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    stored = dataset.pixel_array
    frames = int(dataset.get("NumberOfFrames") or 1)
    stored = stored[frame] if frames > 1 else stored
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        items = dataset.get(groups) or []
        item = items[0 if groups.startswith("Shared") else frame] if items else {}
        for keyword in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for element in item[keyword][0] if keyword in item else ():
                dataset[element.tag] = element
    return stored, dataset


def fingerprint(values):
    values = np.ascontiguousarray(values, np.float64)
    return (values.shape, hashlib.sha256(values.tobytes()).hexdigest())


def values_of(picture):
    return picture.values if isinstance(picture, Intensities) else np.asarray(picture)


def test_every_broken_file_is_named_and_every_other_one_is_read(samples):
    named = {}
    for name, (path, _) in samples.items():
        outcome = opened(path.read_bytes(), max_pixels=LARGEST)
        if isinstance(outcome, SkipReason):
            named[name] = outcome
    assert named == {**BROKEN, **{f"{name}.dcm": SkipReason.NO_PIXELS for name in WITHOUT_PICTURE}}
    unread_by_pydicom = {name for name, (_, row) in samples.items() if "fails" in row["pixels"]}
    assert unread_by_pydicom - set(named) <= BETTER_THAN_THE_INDEX
    assert {name for name, (_, row) in samples.items() if row["pixels"].startswith("(")} & set(named) == set()


def test_every_readable_file_has_the_values_of_pydicom(samples):
    compared, different = 0, []
    for name, (path, row) in samples.items():
        if not row["pixels"].startswith("("):
            continue
        frames = int(row["frames"]) if row["frames"].isdecimal() else 1
        for frame in {0, (frames - 1) // 2, frames - 1}:
            picture = opened(path.read_bytes(), View(frame=frame + 1), max_pixels=LARGEST)
            stored, dataset = by_hand(path, frame)
            if dataset.PhotometricInterpretation == "PALETTE COLOR":
                expected = apply_color_lut(stored, dataset)
                expected = expected >> 8 if expected.dtype == np.uint16 else expected
            else:
                expected = stored if stored.ndim == 3 else apply_modality_lut(stored, dataset)
            # What is not exact in float32 is compared as float64.
            exact = np.float32 if stored.dtype.itemsize <= 2 else np.float64
            if fingerprint(values_of(picture)) != fingerprint(np.asarray(expected, exact)):
                different.append((name, frame))
            compared += 1
    assert different == []
    assert compared > 95


def test_stored_values_span_what_the_index_says(samples):
    """The index was made with another decoder of lossless and 12-bit JPEG than ours."""
    for name, (path, row) in samples.items():
        found = re.match(r"\((.*)\) \S+ \[(\S+)\.\.(\S+)\]", row["pixels"])
        frames = int(row["frames"]) if row["frames"].isdecimal() else 1
        if not found or frames > 1:
            continue
        stored, _ = by_hand(path, 0)
        assert ", ".join(map(str, stored.shape)) == found[1]
        assert (stored.min(), stored.max()) == (float(found[2]), float(found[3])), name


@pytest.mark.parametrize("name", LOSSLESS_JPEG)
def test_lossless_jpeg_is_what_two_other_decoders_give(samples, name):
    opened(samples[name][0].read_bytes())  # our plugin for pydicom is there now
    stored = pydicom.dcmread(samples[name][0]).pixel_array
    assert hashlib.sha256(stored.tobytes()).hexdigest().startswith(LOSSLESS_JPEG[name])


def test_windows_and_tables_are_those_of_pydicom(samples):
    """pydicom's windowing spans its own output range; from black to white it is ours."""
    windowed = set()
    for name, (path, row) in samples.items():
        picture = opened(path.read_bytes(), View(frame=1), max_pixels=LARGEST)
        grey = isinstance(picture, Intensities) and picture.values.ndim == 2
        if not grey or "float" in name or not row["pixels"].startswith("("):
            continue
        stored, dataset = by_hand(path, 0)
        if "WindowWidth" not in dataset and "VOILUTSequence" not in dataset:
            continue
        expected = apply_voi_lut(apply_modality_lut(stored, dataset), dataset).astype(np.float64)
        low, high = expected_range(dataset)
        shades = (expected - low) / (high - low)
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        assert np.allclose(picture.shades(), 1 - shades if inverted else shades, atol=1e-6), name
        windowed.add(name)
    assert {"RG1_J2KI.dcm", "vlut_04.dcm", "MR_small.dcm", "693_J2KR.dcm", "eCT_Supplemental.dcm"} <= windowed


def expected_range(dataset):
    if "VOILUTSequence" in dataset:
        return 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    bits = dataset.BitsStored
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    return low * slope + intercept, high * slope + intercept


def test_a_sample_is_known_by_its_content(samples):
    kinds = {name: format_of(path.read_bytes()[:HEAD_BYTES]) for name, (path, _) in samples.items()}
    assert {name for name, kind in kinds.items() if kind is not Format.DICOM} == {"no_meta.dcm"}


def test_chest_films_of_monochrome1_are_shown_as_films(samples):
    """Bones and tissue are bright, the air beside the patient dark."""
    picture = opened(samples["RG1_J2KI.dcm"][0].read_bytes(), max_pixels=LARGEST)
    shades = picture.shades()
    assert picture.inverted
    raw = picture.shown.shades(picture.values)
    assert np.allclose(shades, 1 - raw)


def test_every_slice_of_the_head_is_what_pydicom_gives(shared_data):
    folder = shared_data / "ct_head_series"
    for path in sorted(folder.glob("*.dcm")):
        picture = opened(path.read_bytes())
        dataset = pydicom.dcmread(path)
        assert fingerprint(picture.values) == fingerprint(dataset.pixel_array)
        assert (picture.shown.centre, picture.shown.width) == (
            float(np.atleast_1d(dataset.WindowCenter)[0]),
            float(np.atleast_1d(dataset.WindowWidth)[0]),
        )


def test_eight_bit_colours_stay_a_plain_picture(samples):
    picture = opened(samples["examples_rgb_color.dcm"][0].read_bytes())
    assert isinstance(picture, Image.Image)
    assert np.array_equal(
        np.asarray(picture), pydicom.dcmread(samples["examples_rgb_color.dcm"][0]).pixel_array
    )
