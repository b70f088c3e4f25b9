"""Broken, oversized and escaping files: skipped, counted and named, whatever they are called."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from client.images.decode import decode, guarded_pillow, pixels_digest
from client.images.records import SkipReason, Unusable
from common.errors import DataError
from common.preprocessing import Preprocessing

SMALL = Preprocessing(image_size=12, channels=1)


def png_bomb(side):
    """A whole PNG of side x side black pixels in about a thousandth of its size."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side // 8 + 1) * min(side, 2000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def big_jpeg():
    noise = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="JPEG")
    return buffer.getvalue()


def animation():
    frames = [Image.new("L", (9, 9), shade) for shade in (0, 90, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


BROKEN = {
    "zero.png": (b"", SkipReason.EMPTY),
    "text.png": (b"Patient: see the other folder\n", SkipReason.UNREADABLE),
    "cut.jpg": (big_jpeg()[:4000], SkipReason.TRUNCATED),
    "head-only.jpg": (big_jpeg()[:20], SkipReason.UNREADABLE),
    "bomb.png": (png_bomb(30_000), SkipReason.OVERSIZED),
    "quiet-bomb.png": (png_bomb(8_000), SkipReason.OVERSIZED),
    "film.gif": (animation(), SkipReason.SEVERAL_FRAMES),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", SkipReason.UNREADABLE),
}


@pytest.fixture
def hospital(tmp_path, draw):
    root = tmp_path / "data"
    for number in range(6):
        draw(root / ("ill" if number % 2 else "normal") / f"good-{number}.png", number)
    return root


def test_the_bomb_is_small_on_disk():
    assert len(png_bomb(30_000)) < 10_000


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("cached", [False, True])
def test_a_broken_file_is_skipped_and_named(hospital, read, tmp_path, name, cached):
    content, reason = BROKEN[name]
    (hospital / "ill" / name).write_bytes(content)
    cache = tmp_path / "cache" if cached else None
    for _ in range(2):
        images = read(hospital, max_skipped_share=0.5, cache=cache)
        assert [(s.path, s.reason) for s in images.skipped] == [(f"ill/{name}", reason)]
        assert images.counts["train"] == {"normal": 3, "ill": 3}
    with pytest.raises(DataError, match="1 of 7"):
        read(hospital, cache=cache)


def test_all_of_them_at_once_leave_the_good_ones_untouched(hospital, read):
    expected = read(hospital).train
    for name, (content, _) in BROKEN.items():
        (hospital / "normal" / name).write_bytes(content)
    images = read(hospital, max_skipped_share=0.9)
    assert {s.path.split("/")[1]: s.reason for s in images.skipped} == {
        name: reason for name, (_, reason) in BROKEN.items()
    }
    assert np.array_equal(images.train.inputs["image"], expected.inputs["image"])
    assert images.train.unit_ids == expected.unit_ids


def test_the_pixel_limit_is_the_hospitals_own(hospital, read):
    assert read(hospital, max_pixels=144).skipped == ()
    with pytest.raises(DataError, match="6 oversized"):
        read(hospital, max_pixels=143)


def test_a_large_picture_is_read_where_the_hospital_allows_it(hospital, read):
    limit = Image.MAX_IMAGE_PIXELS
    Image.new("1", (10_000, 9_000)).save(hospital / "ill" / "slide.png")  # above Pillow's own limit
    assert len(read(hospital, max_skipped_share=0.5).skipped) == 1
    assert read(hospital, max_pixels=90_000_000).skipped == ()
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_file_larger_than_any_such_picture_is_not_even_read(hospital, read):
    with (hospital / "ill" / "huge.png").open("wb") as file:
        file.truncate(3 * 2**20)
    images = read(hospital, max_pixels=2**17, max_skipped_share=0.5)
    assert [s.reason for s in images.skipped] == [SkipReason.OVERSIZED]


def escapes(tmp_path, hospital, draw):
    """Ways out of the data folder, each leading to a real picture."""
    outside = draw(tmp_path / "outside" / "ill" / "secret.png", 99)
    (hospital / "ill" / "link.png").symlink_to(outside)
    (hospital / "ill" / "linked-folder").symlink_to(outside.parent, target_is_directory=True)
    (hospital / "covid").symlink_to(outside.parent, target_is_directory=True)
    (hospital / "ill" / "loop").symlink_to(hospital / "ill", target_is_directory=True)


def test_links_out_of_the_folder_are_not_followed(tmp_path, hospital, draw, read):
    escapes(tmp_path, hospital, draw)
    images = read(hospital, max_skipped_share=0.9)
    assert {s.path for s in images.skipped} == {"ill/link.png", "ill/linked-folder", "ill/loop", "covid"}
    assert images.classes == ("normal", "ill")
    assert {s.reason for s in images.skipped} == {SkipReason.ESCAPING}
    assert images.train.num_rows == 6


def test_a_linked_split_folder_does_not_lead_out(tmp_path, draw, read):
    for number in range(4):
        draw(tmp_path / "data" / "train" / ("ill" if number % 2 else "normal") / f"{number}.png", number)
        draw(tmp_path / "outside" / ("ill" if number % 2 else "normal") / f"{number}.png", number + 9)
    (tmp_path / "data" / "test").symlink_to(tmp_path / "outside", target_is_directory=True)
    images = read(tmp_path / "data", max_skipped_share=0.9)
    assert {s.reason for s in images.skipped} == {SkipReason.ESCAPING}
    assert (images.train.num_rows, images.test.num_rows, len(images.skipped)) == (4, 0, 4)


def test_a_link_inside_the_folder_and_a_linked_folder_itself_are_fine(tmp_path, hospital, read):
    (hospital / "ill" / "link.png").symlink_to(hospital / "ill" / "good-1.png")
    (tmp_path / "shortcut").symlink_to(hospital, target_is_directory=True)
    images = read(tmp_path / "shortcut")
    assert images.skipped == ()
    assert (images.train.num_rows, images.train.num_units) == (7, 6)


def test_a_manifest_cannot_name_files_outside(tmp_path, manifest, draw, read):
    outside = draw(tmp_path / "secret.png", 99)
    draw(tmp_path / "data-2" / "x.png", 98)  # a folder whose name begins like the root's
    ways = [
        "../secret.png",
        "sub/../../secret.png",
        str(outside),
        "../data-2/x.png",
        "link.png",
        "..",
        "/etc/passwd",
    ]
    rows = [("a.png", "ill"), ("b.png", "normal"), *((way, "ill") for way in ways)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(outside)
    images = read(manifest(("path", "label"), rows), max_skipped_share=0.9)
    assert [(s.path, s.reason) for s in images.skipped] == [(way, SkipReason.ESCAPING) for way in ways]
    assert images.train.num_rows == 2


def test_pipes_folders_and_forbidden_files_do_not_block(hospital, read, monkeypatch):
    os.mkfifo(hospital / "ill" / "pipe.png")
    (hospital / "ill" / "folder.png").mkdir()
    images = read(hospital, max_skipped_share=0.9)
    assert [(s.path, s.reason) for s in images.skipped] == [("ill/pipe.png", SkipReason.UNREADABLE)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read_is_skipped(hospital, read):
    (hospital / "ill" / "good-1.png").chmod(0)
    assert [s.reason for s in read(hospital, max_skipped_share=0.9).skipped] == [SkipReason.UNREADABLE]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"])
def test_a_damaged_file_gives_a_picture_or_a_reason_and_nothing_else(format, seed):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(buffer, format=format)
    content = bytearray(buffer.getvalue())
    for place in rng.integers(0, len(content), 8):
        content[place] = rng.integers(0, 256)
    content = bytes(content[: rng.integers(len(content) // 2, len(content))])
    with guarded_pillow(10**6):
        try:
            outcome = decode(content, SMALL, max_pixels=10**6).pixels.shape
        except Unusable as unusable:
            outcome = unusable.reason
    assert outcome == (1, 12, 12) or outcome in SkipReason


def test_guarding_ends_with_the_block():
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    with guarded_pillow(5):
        assert Image.MAX_IMAGE_PIXELS == 5
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_a_turned_photograph_is_put_upright(tmp_path):
    ramp = np.linspace(0, 255, 144).astype(np.uint8).reshape(12, 12)
    exif = Image.Exif()
    exif[0x0112] = 3
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, format="PNG", exif=exif)
    with guarded_pillow(10**6):
        image = decode(buffer.getvalue(), SMALL, max_pixels=10**6)
    assert np.array_equal(image.pixels[0], np.rot90(ramp, 2))
    assert image.digest == pixels_digest(np.rot90(ramp, 2))
