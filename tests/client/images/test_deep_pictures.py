"""Pictures of 16 bits: grey, RGB and RGBA keep their depth until they are scaled."""

import io

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from client.images.content import Format, format_of
from client.images.records import SkipReason, View
from common.intensities import Intensities
from tests.client.images.medical_files import opened, screen

RNG = np.random.default_rng(0)
DARK = RNG.permutation(30 * 20).reshape(30, 20).astype(np.uint16)  # 0..599 of 65535
DARK_RGB = np.stack([DARK, DARK[::-1], 599 - DARK], axis=-1)


def deep_file(pixels, format):
    """Bytes of a PNG or TIFF with these 16-bit values."""
    return imagecodecs.png_encode(pixels) if format == "PNG" else imagecodecs.tiff_encode(pixels)


def tiff(pixels):
    """An uncompressed little-endian TIFF (H, W, channels) of 16 bits, written by hand."""
    height, width, channels = pixels.shape
    values = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, 0), (259, 3, 1, 1), (262, 3, 1, 2)]
    values += [(273, 4, 1, 0), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, pixels.nbytes)]
    values += [(338, 3, 1, 2)] if channels == 4 else []
    after = 8 + 2 + 12 * len(values) + 4
    entries = b""
    for tag, kind, count, value in values:
        value = {258: after, 273: after + 2 * channels}.get(tag, value)
        entries += np.array([tag, kind], "<u2").tobytes() + np.array([count, value], "<u4").tobytes()
    head = b"II*\0" + np.uint32(8).tobytes() + np.uint16(len(values)).tobytes() + entries + bytes(4)
    return head + np.full(channels, 16, "<u2").tobytes() + pixels.astype("<u2").tobytes()


def expected_bytes(pixels):
    return np.rint((pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255)


@pytest.mark.parametrize("write", [imagecodecs.png_encode, tiff])
def test_dark_colours_of_16_bits_keep_all_their_shades(write):
    content = write(DARK_RGB)
    assert format_of(content[:64]) in (Format.PNG, Format.TIFF)
    picture = opened(content)
    assert isinstance(picture, Intensities)
    assert np.array_equal(picture.values, DARK_RGB)
    assert np.abs(picture.eight_bits() - expected_bytes(DARK_RGB)).max() <= 1


def test_a_grey_png_of_16_bits_is_neither_its_upper_nor_its_lower_byte():
    content = imagecodecs.png_encode(DARK)
    assert np.array_equal(opened(content).values, DARK)
    assert np.abs(screen(content) - expected_bytes(DARK)).max() <= 1
    buffer = io.BytesIO()
    Image.fromarray(DARK).save(buffer, format="TIFF")
    assert np.array_equal(screen(buffer.getvalue()), screen(content))


@pytest.mark.parametrize("write", [imagecodecs.png_encode, tiff])
def test_transparency_of_16_bits_is_laid_over_black(write):
    alpha = np.full(DARK.shape, 65535, np.uint16)
    alpha[:10], alpha[10:12] = 0, 32768
    values = opened(write(np.concatenate([DARK_RGB, alpha[..., None]], axis=-1))).values
    assert not values[:10].any()
    assert np.abs(values[10:12] - DARK_RGB[10:12] / 2).max() <= 1
    assert np.array_equal(values[12:], DARK_RGB[12:])


def test_grey_with_transparency_of_16_bits():
    alpha = np.full(DARK.shape, 65535, np.uint16)
    alpha[:10] = 0
    values = opened(imagecodecs.png_encode(np.stack([DARK, alpha], axis=-1))).values
    assert values.shape == DARK.shape
    assert np.array_equal(values[10:], DARK[10:])
    assert not values[:10].any()


def test_a_deep_picture_that_is_cut_or_too_large_has_its_reason():
    content = imagecodecs.png_encode(DARK_RGB)
    assert opened(content, max_pixels=599) is SkipReason.OVERSIZED
    for end in range(40, len(content) - 16, 200):
        assert isinstance(opened(content[:end]), SkipReason | Intensities)
    assert isinstance(opened(content[: len(content) // 2]), SkipReason)


def test_pages_are_pictures_of_their_own():
    pages = [Image.new("L", (9, 9), shade) for shade in (10, 90, 200)]
    buffer = io.BytesIO()
    pages[0].save(buffer, format="TIFF", save_all=True, append_images=pages[1:])
    content = buffer.getvalue()
    assert opened(content) is SkipReason.SEVERAL_FRAMES
    assert (screen(content, View(frame=2)) == 90).all()
    assert opened(content, View(frame=4)) is SkipReason.NO_SUCH_FRAME


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_colours_are_turned_upright_as_eight_bit_ones_are(orientation):
    shallow = (DARK_RGB // 4).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(shallow).save(buffer, format="PNG", exif=exif)
    chunk = buffer.getvalue()
    start = chunk.index(b"eXIf") - 4
    length = int.from_bytes(chunk[start : start + 4], "big") + 12
    deep = imagecodecs.png_encode(shallow.astype(np.uint16) * 257)
    end_of_header = 8 + 25
    deep = deep[:end_of_header] + chunk[start : start + length] + deep[end_of_header:]
    assert np.array_equal(opened(deep).values, screen(buffer.getvalue()).astype(np.float32) * 257)
