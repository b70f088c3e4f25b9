"""NIfTI: the real files against nibabel by hand, and the rules one by one."""

import gzip
import hashlib
import struct
import tracemalloc

import nibabel
import numpy as np
import pytest

from client.images.content import Format, format_of
from client.images.records import SkipReason, View
from common.intensities import Span
from tests.client.images.medical_files import nifti, opened, screen

VOXELS = np.random.default_rng(0).integers(-900, 900, (7, 6, 5)).astype(np.int16)


def by_hand(image, frame, volume=0):
    """One slice as nibabel gives it, shown as radiology does."""
    data = nibabel.as_closest_canonical(image).get_fdata()
    data = data[..., volume] if data.ndim == 4 else data
    return data[:, :, frame].T[::-1, ::-1]


def fingerprint(values):
    return hashlib.sha256(np.ascontiguousarray(values, np.float32).tobytes()).hexdigest()


def test_every_slice_of_every_sample_is_what_nibabel_gives(shared_data):
    paths = sorted((shared_data / "nifti_samples").glob("*.nii*"))
    assert len(paths) == 8
    for path in paths:
        content, image = path.read_bytes(), nibabel.load(path)
        assert format_of(content[:2048]) is Format.NIFTI
        shape = nibabel.as_closest_canonical(image).shape
        for frame in {0, (shape[2] - 1) // 2, shape[2] - 1}:
            for volume in {0, shape[3] - 1} if len(shape) == 4 else {0}:
                picture = opened(content, View(frame=frame + 1, volume=volume + 1))
                assert fingerprint(picture.values) == fingerprint(by_hand(image, frame, volume)), path.name
        default = opened(content)
        assert fingerprint(default.values) == fingerprint(by_hand(image, (shape[2] - 1) // 2))
        assert np.isfinite(default.shades()).all()


@pytest.mark.parametrize("code", ["LPS", "RAS", "PIR", "SAL", "IPR"])
def test_however_it_is_stored_the_same_slice_is_shown(code):
    """Anterior at the top, the patient's right at the left, slices from the feet up."""
    plain = nibabel.Nifti1Image(VOXELS, np.diag([2.0, 3.0, 4.0, 1.0]))
    way = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(plain.affine), nibabel.orientations.axcodes2ornt(code)
    )
    turned = plain.as_reoriented(way)
    assert "".join(nibabel.aff2axcodes(turned.affine)) == code
    for frame in range(5):
        seen = opened(turned.to_bytes(), View(frame=frame + 1)).values
        assert np.array_equal(seen, VOXELS[::-1, ::-1, frame].T)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u1", "<f4", ">f8", "<i4", "<u2"])
def test_types_byte_orders_and_scaling(kind, dtype):
    voxels = np.abs(VOXELS // 8).astype(dtype)
    header = kind.header_class(endianness=dtype[0])
    header.set_data_dtype(dtype)
    image = kind(voxels, np.eye(4), header)
    if voxels.dtype.kind != "f":
        image.header.set_slope_inter(0.5, 3)
    content = image.to_bytes()
    expected = by_hand(kind.from_bytes(content), 2)
    assert fingerprint(opened(content).values) == fingerprint(expected)
    assert fingerprint(opened(gzip.compress(content)).values) == fingerprint(expected)


def test_the_range_is_the_headers_or_the_volumes():
    content = nifti(VOXELS)
    ends = np.quantile(VOXELS, [0.001]), np.quantile(VOXELS, [0.999])
    shown = opened(content).shown
    assert shown.low <= ends[0]
    assert shown.high >= ends[1]
    assert opened(content, View(frame=1)).shown == shown  # not the slice's own
    image = nibabel.Nifti1Image(VOXELS, np.eye(4))
    image.header["cal_min"], image.header["cal_max"] = -50, 75
    assert opened(image.to_bytes()).shown == Span(low=-50, high=75)


def test_what_is_not_a_number_is_black():
    voxels = np.ones((4, 4, 1), np.float32)
    voxels[0, 0], voxels[1, 1], voxels[2, 2], voxels[3, 3] = np.nan, np.inf, -np.inf, 5
    assert np.count_nonzero(screen(nifti(voxels))) == 1


def test_colours_and_a_single_slice():
    colours = np.random.default_rng(1).integers(0, 256, (4, 3, 1, 3), dtype=np.uint8)
    voxels = colours.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    assert np.array_equal(screen(nifti(voxels)), colours[::-1, ::-1, 0].transpose(1, 0, 2))
    assert opened(nifti(VOXELS[:, :, 0])).values.shape == (6, 7)


def test_frames_and_volumes_that_are_not_there():
    assert opened(nifti(VOXELS), View(frame=6)) is SkipReason.NO_SUCH_FRAME
    several = np.stack([VOXELS, VOXELS + 1], axis=-1)
    assert opened(nifti(several), View(volume=3)) is SkipReason.NO_SUCH_FRAME
    assert np.array_equal(opened(nifti(several), View(volume=2)).values, by_hand_first(several[..., 1]))


def by_hand_first(voxels):
    return voxels[:, :, 2].T[::-1, ::-1]


def with_sides(content, *sides):
    """The file with other sides in its header."""
    changed = bytearray(content)
    struct.pack_into(f"<{1 + len(sides)}h", changed, 40, len(sides), *sides)
    return bytes(changed)


def test_absurd_sizes_are_refused_before_anything_is_unpacked():
    content = nifti(VOXELS)
    cases = {
        with_sides(content, 30000, 30000, 1): SkipReason.OVERSIZED,
        with_sides(content, 900, 900, 30000): SkipReason.OVERSIZED,
        with_sides(content, 900, 900, 5, 30000): SkipReason.TRUNCATED,
        with_sides(content, -5, 6, 7): SkipReason.INCONSISTENT,
        with_sides(content, 0, 6, 7): SkipReason.INCONSISTENT,
        with_sides(content, 9): SkipReason.INCONSISTENT,
        with_sides(content, 8, 6, 5): SkipReason.TRUNCATED,
    }
    tracemalloc.start()
    for damaged, reason in cases.items():
        assert opened(damaged) is reason
    assert opened(gzip.compress(with_sides(content, 900, 900, 30000))) is SkipReason.OVERSIZED
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_gzip_bomb_is_unpacked_as_far_as_the_header_says():
    bomb = gzip.compress(nifti(VOXELS) + bytes(200_000_000))
    assert len(bomb) < 300_000
    tracemalloc.start()
    assert np.array_equal(opened(bomb).values, by_hand_first(VOXELS))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_what_it_cannot_show_is_named():
    assert opened(nifti(VOXELS.astype(np.complex64))) is SkipReason.UNSUPPORTED
    damaged = bytearray(nifti(VOXELS))
    struct.pack_into("<h", damaged, 70, 999)  # the type of a voxel
    assert opened(bytes(damaged)) is SkipReason.UNSUPPORTED
    struct.pack_into("<f", damaged, 108, np.nan)  # where the voxels begin
    struct.pack_into("<h", damaged, 70, 4)
    assert opened(bytes(damaged)) is SkipReason.INCONSISTENT


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_cut_anywhere_gives_a_reason(zipped):
    content = nifti(VOXELS, zipped=zipped)
    outcomes = [opened(content[:end]) for end in range(1, len(content) - 8, 11)]
    assert all(isinstance(outcome, SkipReason) for outcome in outcomes)
    assert SkipReason.TRUNCATED in outcomes


def test_200_damaged_samples_give_a_picture_or_a_reason(shared_data):
    rng = np.random.default_rng(2)
    contents = [path.read_bytes() for path in sorted((shared_data / "nifti_samples").glob("*.nii*"))]
    for number in range(200):
        content = bytearray(contents[number % len(contents)])
        for place in rng.integers(0, 400, 5):
            content[place] = rng.integers(0, 256)
        outcome = opened(bytes(content[: rng.integers(100, len(content) + 1)]))
        assert outcome in SkipReason if isinstance(outcome, str) else outcome is not None


def pair(folder, voxels, *, suffix=""):
    """A header and its voxels as two files; the header's path."""
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Pair(voxels, np.eye(4)), folder / f"brain.img{suffix}")
    return folder / f"brain.hdr{suffix}"


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("named", ["hdr", "img"])
def test_a_pair_is_one_image_by_either_name(tmp_path, read, suffix, named):
    pair(tmp_path / "data", VOXELS, suffix=suffix)
    (tmp_path / "data" / "one.nii").write_bytes(nifti(VOXELS))
    (tmp_path / "data" / "scans.csv").write_text(f"path,label\nbrain.{named}{suffix},ill\none.nii,well\n")
    images = read(tmp_path / "data" / "scans.csv")
    assert images.skipped == ()
    assert np.array_equal(images.train.inputs["image"][0], images.train.inputs["image"][1])
    assert images.repeated_images == 1


def test_in_folders_the_voxels_of_a_pair_are_no_image_of_their_own(tmp_path, read):
    header = pair(tmp_path / "data" / "ill", VOXELS)
    (tmp_path / "data" / "well").mkdir()
    (tmp_path / "data" / "well" / "one.nii").write_bytes(nifti(VOXELS + 1))
    images = read(tmp_path / "data")
    assert [(entry.path, entry.reason) for entry in images.skipped] == [("ill/brain.img", "other-file")]
    assert images.train.num_rows == 2
    header.with_suffix(".img").unlink()
    images = read(tmp_path / "data", max_skipped_share=0.5)
    assert [(entry.path, entry.reason) for entry in images.skipped] == [("ill/brain.hdr", "missing")]
