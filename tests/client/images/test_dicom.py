"""DICOM rules one by one, on generated files; damage of every kind gives a reason."""

import io
import logging
import struct
import tracemalloc
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    RLELossless,
)

from client.images.content import Format, format_of
from client.images.records import SkipReason, View
from common.intensities import Span, Window
from tests.client.images.medical_files import dicom, opened, screen

RAMP = np.arange(-200, 200, dtype=np.int16).reshape(20, 20)
BYTES = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)


def test_rescale_and_the_first_of_several_windows():
    content = dicom(
        RAMP, RescaleSlope="2", RescaleIntercept="-10", WindowCenter=["40", "500"], WindowWidth=["80", "9"]
    )
    picture = opened(content)
    assert np.array_equal(picture.values, RAMP * 2.0 - 10)
    assert picture.shown == Window(centre=40, width=80)
    # PS3.3 C.11.2.1.2.1, from the standard's text
    x = picture.values.astype(float)
    y = ((x - 39.5) / 79 + 0.5) * 255
    y = np.where(x <= 39.5 - 39.5, 0, np.where(x > 39.5 + 39.5, 255, y))
    assert np.abs(picture.eight_bits().astype(float) - y).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("function", ["SIGMOID", "LINEAR_EXACT"])
def test_other_window_functions(function):
    content = dicom(RAMP, WindowCenter="10", WindowWidth="60", VOILUTFunction=function)
    x = RAMP.astype(float)
    y = 1 / (1 + np.exp(-4 * (x - 10) / 60)) if function == "SIGMOID" else ((x - 10) / 60 + 0.5).clip(0, 1)
    assert np.allclose(opened(content).shades(), y, atol=1e-6)


@pytest.mark.parametrize(("centre", "width"), [("5", "0"), ("5", "-4"), ("", ""), (None, "5")])
def test_a_window_that_is_none_is_not_used(centre, width):
    elements = {"WindowWidth": width} if centre is None else {"WindowCenter": centre, "WindowWidth": width}
    assert opened(dicom(RAMP, **elements)).shown == Span(low=-200, high=199)


def test_without_a_window_the_quantiles_decide_and_padding_does_not_count():
    pixels = RAMP.repeat(6, axis=0).repeat(6, axis=1).copy()
    pixels[:2] = -2000
    pixels[5, 5] = 30000  # one hot pixel of 14,400
    picture = opened(dicom(pixels, PixelPaddingValue=-2000))
    assert picture.shown == Span(low=-200, high=199)
    assert picture.eight_bits()[0].max() == 0


def test_monochrome1_is_turned_round():
    plain, turned = dicom(BYTES), dicom(BYTES, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(screen(plain), BYTES)
    assert np.array_equal(screen(turned), 255 - BYTES)


def test_bits_that_are_allocated_but_not_stored_are_no_intensities():
    stored = np.arange(400, dtype=np.uint16).reshape(20, 20)
    with_overlay = stored | 0xA000
    content = dicom(with_overlay, BitsStored=12, HighBit=11)
    assert np.array_equal(opened(content).values, stored)


def test_signed_values_of_few_bits_keep_their_sign():
    twelve = (RAMP.astype(np.int32) & 0x0FFF).astype(np.uint16)  # without the sign's upper bits
    content = dicom(twelve, BitsStored=12, HighBit=11, PixelRepresentation=1)
    assert np.array_equal(opened(content).values, RAMP)


def test_every_stored_value_of_16_bits_stays_apart():
    every = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    assert len(np.unique(opened(dicom(every)).values)) == 2**16


def test_colours_by_pixel_and_by_plane():
    colours = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    by_plane = dicom(colours, PlanarConfiguration=1, PixelData=colours.transpose(2, 0, 1).tobytes())
    assert np.array_equal(screen(dicom(colours)), colours)
    assert np.array_equal(screen(by_plane), colours)


def test_a_palette_of_8_bits_in_the_upper_byte_of_16():
    table = np.arange(256, dtype=np.uint16) << 8
    palette = {}
    for number, colour in enumerate(("Red", "Green", "Blue")):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = np.roll(table, number).tobytes()
    content = dicom(BYTES, PhotometricInterpretation="PALETTE COLOR", **palette)
    assert np.array_equal(screen(content), np.stack([BYTES - number for number in range(3)], axis=-1))


def test_a_table_of_shades_comes_before_a_window():
    item = Dataset()
    item.LUTDescriptor = [4, 10, 8]
    item.LUTData = np.array([0, 255, 51, 204], "<u2").tobytes()
    pixels = np.array([[0, 10, 11], [12, 13, 60000]], np.uint16)
    content = dicom(pixels, VOILUTSequence=[item], WindowCenter="5", WindowWidth="9")
    assert screen(content).tolist() == [[0, 0, 255], [51, 204, 204]]


def test_a_frame_is_chosen_and_the_default_is_the_middle_one():
    film = np.random.default_rng(2).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    content = dicom(film, frames=6)
    assert np.array_equal(screen(content), film[2])
    assert np.array_equal(screen(content, View(frame=1)), film[0])
    assert np.array_equal(screen(content, View(frame=6)), film[5])
    assert opened(content, View(frame=7)) is SkipReason.NO_SUCH_FRAME
    assert np.array_equal(screen(dicom(film[0]), View(frame=57)), film[0])  # holds one picture only


@pytest.mark.parametrize(
    ("syntax", "preamble"),
    [
        (ImplicitVRLittleEndian, True),
        (ImplicitVRLittleEndian, False),
        (ExplicitVRLittleEndian, False),
        (DeflatedExplicitVRLittleEndian, True),
    ],
)
def test_uncompressed_syntaxes_with_and_without_preamble(syntax, preamble):
    content = dicom(RAMP, syntax=syntax)
    content = content if preamble else _without_meta(content)
    assert format_of(content[:2048]) is Format.DICOM
    assert np.array_equal(opened(content).values, RAMP)


def _without_meta(content):
    """Only the data set of a file."""
    (length,) = struct.unpack_from("<L", content, 140)
    return content[144 + length :]


def test_big_endian_values():
    content = dicom(RAMP.astype(">i2"), syntax=ExplicitVRBigEndian)
    assert np.array_equal(opened(content).values, RAMP)


def coded(frames, syntax, **elements):
    """A DICOM file around frames that are coded already."""
    content = dicom(np.zeros((20, 20), np.uint16), **elements)
    dataset = pydicom.dcmread(io.BytesIO(content))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    stream = io.BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


def test_lossless_jpeg_of_any_predictor_and_12_bit_jpeg():
    import imagecodecs

    pixels = np.random.default_rng(3).integers(0, 4096, (20, 20), dtype=np.uint16)
    twelve = {"BitsStored": 12, "HighBit": 11}
    for predictor, syntax in ((1, JPEGLosslessSV1), (4, JPEGLossless)):
        frame = imagecodecs.jpeg8_encode(pixels, lossless=True, predictor=predictor, bitspersample=12)
        assert np.array_equal(opened(coded([frame], syntax, **twelve)).values, pixels)


def test_a_coded_picture_larger_than_its_header_is_not_decoded(monkeypatch):
    import pydicom.pixels.decoders.base as decoders

    buffer = io.BytesIO()
    Image.fromarray(np.zeros((900, 900), np.uint8)).save(buffer, format="JPEG")
    stated = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    content = coded([buffer.getvalue()], JPEGBaseline8Bit, **stated)
    monkeypatch.setattr(decoders.Decoder, "as_array", None)  # would be an AttributeError
    assert opened(content) is SkipReason.INCONSISTENT


def test_a_coded_picture_of_more_samples_than_its_header_is_not_decoded():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(buffer, format="JPEG2000", irreversible=False)
    stream = buffer.getvalue()
    stream = bytearray(stream[stream.index(b"\xff\x4f\xff\x51") :])
    assert opened(coded([bytes(stream)], JPEG2000Lossless)) is not SkipReason.INCONSISTENT
    stream[40:42] = b"\x40\x00"  # 16384 samples
    assert opened(coded([bytes(stream)], JPEG2000Lossless)) is SkipReason.INCONSISTENT


def test_what_cannot_be_decoded_has_its_reason():
    frame = b"\0" * 64
    assert opened(coded([frame], "1.2.840.10008.1.2.4.102")) is SkipReason.UNSUPPORTED  # a film in MPEG-4
    assert opened(coded([frame], "1.2.3.4.5")) is SkipReason.UNSUPPORTED
    for syntax in (JPEG2000Lossless, RLELossless, JPEGLosslessSV1):
        assert opened(coded([frame], syntax)) is SkipReason.INCONSISTENT
    assert opened(coded([frame], RLELossless, NumberOfFrames=3)) is SkipReason.TRUNCATED
    colours = np.zeros((4, 4, 3), np.uint8)
    assert opened(dicom(colours, PhotometricInterpretation="HSV")) is SkipReason.UNSUPPORTED


@pytest.mark.timeout(20)
def test_boxes_around_a_codestream_that_lead_nowhere_or_in_circles():
    buffer = io.BytesIO()
    pixels = np.random.default_rng(6).integers(0, 4096, (20, 20), dtype=np.uint16)
    Image.fromarray(pixels).save(buffer, format="JPEG2000", irreversible=False)
    boxed = buffer.getvalue()
    start = boxed.index(b"\xff\x4f\xff\x51")
    for whole in (boxed, boxed[start:]):
        assert np.array_equal(opened(coded([whole], JPEG2000Lossless)).values, pixels)
    for length in (0, 7, 2**31):  # of the second box; pydicom would read the first for ever
        circle = boxed[:12] + struct.pack(">L", length) + boxed[16:]
        assert opened(coded([circle], JPEG2000Lossless)) is SkipReason.INCONSISTENT


def test_damaged_rle_frames_raise_nothing_else():
    content = _rle(RAMP)
    place = content.index(b"\x02\0\0\0\x40\0\0\0")  # two segments, the first at 64
    rng = np.random.default_rng(8)
    for _ in range(300):
        damaged = bytearray(content)
        for at in rng.integers(place, len(content), 4):
            damaged[at] = rng.integers(0, 256)
        assert opened(bytes(damaged)) is not None


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Rows": 65535, "Columns": 65535}, SkipReason.OVERSIZED),
        ({"Rows": 0}, SkipReason.INCONSISTENT),
        ({"Rows": 21}, SkipReason.TRUNCATED),
        ({"NumberOfFrames": 2_000_000_000}, SkipReason.TRUNCATED),
        ({"BitsAllocated": 12}, SkipReason.INCONSISTENT),
        ({"SamplesPerPixel": 7}, SkipReason.INCONSISTENT),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_decoded(elements, reason):
    tracemalloc.start()
    assert opened(dicom(RAMP, **elements)) is reason
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_of_a_film_one_frame_is_taken_into_memory():
    film = np.random.default_rng(9).integers(0, 4096, (120, 128, 128), dtype=np.uint16)
    content = dicom(film, frames=120)
    opened(content)  # what is imported once
    tracemalloc.start()
    assert np.array_equal(opened(content, View(frame=77)).values, film[76])
    assert tracemalloc.get_traced_memory()[1] < len(content) / 4
    tracemalloc.stop()


def test_a_deflated_bomb_is_not_inflated():
    bomb = dicom(RAMP, syntax=DeflatedExplicitVRLittleEndian)
    (length,) = struct.unpack_from("<L", bomb, 140)
    deflater = zlib.compressobj(9, wbits=-15)
    bomb = bomb[: 144 + length] + deflater.compress(bytes(200_000_000)) + deflater.flush()
    assert len(bomb) < 300_000
    tracemalloc.start()
    assert opened(bomb) is SkipReason.OVERSIZED
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["plain", "deflated", "rle", "multi-frame"])
def test_a_file_cut_anywhere_gives_a_reason(kind):
    film = np.random.default_rng(4).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    content = {
        "plain": lambda: dicom(RAMP, WindowCenter="4", WindowWidth="9"),
        "deflated": lambda: dicom(RAMP, syntax=DeflatedExplicitVRLittleEndian),
        "rle": lambda: _rle(RAMP),
        "multi-frame": lambda: dicom(film, frames=3),
    }[kind]()
    whole = screen(content)
    seen = set()
    for end in np.unique(np.linspace(1, len(content) - 1, 60).astype(int)):
        outcome = opened(content[:end])
        if not isinstance(outcome, SkipReason):  # only the last delimiter is missing
            assert np.array_equal(screen(content[:end]), whole)
            assert end >= len(content) - 8
        seen.add(outcome if isinstance(outcome, SkipReason) else "whole")
    assert SkipReason.TRUNCATED in seen


def _rle(pixels):
    dataset = pydicom.dcmread(io.BytesIO(dicom(pixels)))
    dataset.compress(RLELossless, generate_instance_uid=False)
    stream = io.BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


def test_200_damaged_samples_give_a_picture_or_a_reason(shared_data):
    rng = np.random.default_rng(5)
    folder = shared_data / "dicom_samples"
    paths = [path for path in sorted(folder.glob("*.dcm")) if path.stat().st_size < 120_000]
    for number in range(200):
        content = bytearray(paths[number % len(paths)].read_bytes())
        for place in rng.integers(0, len(content), 6):
            content[place] = rng.integers(0, 256)
        content = bytes(content[: rng.integers(len(content) // 3, len(content) + 1)])
        outcome = opened(content)
        assert outcome in SkipReason if isinstance(outcome, str) else outcome is not None


def test_nothing_of_a_header_is_said_anywhere(caplog, capfd, tmp_path, read):
    names = {"PatientName": "Planted^Name", "PatientID": "PLANTED-ID", "PatientBirthDate": "1942PLANTED"}
    odd = {
        "WindowCenter": "11.11111",
        "WindowWidth": "40",
        "StudyDate": "PLANTED-DATE",
        "AccessionNumber": "PLANT",
    }
    with pytest.warns(UserWarning, match="PLANTED"):  # pydicom, as a writer
        whole = dicom(RAMP, **names, **odd)
    folder = tmp_path / "data"
    for label in ("ill", "well"):
        (folder / label).mkdir(parents=True)
    (folder / "ill" / "a.dcm").write_bytes(whole)
    (folder / "well" / "b.dcm").write_bytes(whole.replace(b"\0\0\xc8\0", b"\0\0\xc9\0"))
    (folder / "well" / "cut.dcm").write_bytes(whole[:-40])
    (folder / "well" / "odd.dcm").write_bytes(whole[:700] + b"PLANTED" + whole[700:])
    (folder / "well" / "window.dcm").write_bytes(whole.replace(b"11.11111", b"PLANTED1"))
    (folder / "well" / "syntax.dcm").write_bytes(
        whole.replace(b"1.2.840.10008.1.2.1", b"1.2.PLANTED.8.1.2.1")
    )
    capfd.readouterr()
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        images = read(folder, cache=tmp_path / "cache", max_skipped_share=0.9)
    assert {entry.path for entry in images.skipped} == {"well/cut.dcm", "well/syntax.dcm"}
    told = repr(images) + repr(images.skipped) + caplog.text + "".join(capfd.readouterr())
    kept = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert "plant" not in told.lower()
    assert b"plant" not in kept.lower()
