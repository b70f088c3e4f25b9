"""Folders of DICOM slices, and manifests that mix all formats."""

import random
import shutil

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from client.doctor.checkup import check_images
from client.images.decode import guarded_pillow
from client.images.entries import read_entry
from client.images.records import SkipReason, Unusable, View
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing
from tests.client.images.medical_files import dicom

TILTED = [1, 0, 0, 0, 0.948, -0.317]


def series(folder, places, *, names=None, thickness=4.0, orientation=TILTED, uid="1.2.3", **elements):
    """One file per place along the normal, in mm; slice n holds the value n everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.array(orientation, float).reshape(2, 3)
    normal = np.cross(*axes) / np.linalg.norm(np.cross(*axes))
    for number, place in enumerate(places):
        content = dicom(
            np.full((6, 6), number, np.uint8),
            ImagePositionPatient=[f"{value:.6f}" for value in 7 + normal * place],
            ImageOrientationPatient=orientation,
            SeriesInstanceUID=uid,
            SliceThickness=str(thickness),
            InstanceNumber=str(90 - number),
            **elements,
        )
        (folder / (names[number] if names else f"{number:03}.dcm")).write_bytes(content)
    return folder


def numbers(folder, count):
    """What slices 1..count of the folder hold."""
    return [int(np.asarray(picture(folder, frame + 1))[0, 0]) for frame in range(count)]


def picture(folder, frame=None):
    with guarded_pillow(10**6):
        return read_entry(str(folder), View(frame=frame), max_pixels=10**6)


def reason(folder):
    with pytest.raises(Unusable) as caught:
        picture(folder)
    return caught.value.reason


def test_slices_lie_in_order_whatever_they_are_called(tmp_path):
    names = [f"{name}.dcm" for name in "hcgbfaed"]
    folder = series(tmp_path / "s", [4.0 * n for n in range(8)], names=names)
    (folder / "notes.txt").write_text("a note")
    (folder / "DICOMDIR").write_bytes(dicom(np.zeros((2, 2), np.uint8))[:300])
    assert numbers(folder, 8) == list(range(8))
    assert int(np.asarray(picture(folder))[0, 0]) == 3  # the middle one, of an even number the first


def test_the_real_head_in_any_order_of_names(shared_data, tmp_path):
    originals = sorted((shared_data / "ct_head_series").glob("*.dcm"))
    shuffled = originals.copy()
    random.Random(1).shuffle(shuffled)
    for number, path in enumerate(shuffled):
        shutil.copyfile(path, tmp_path / f"{number:02}")
    for frame in (1, 14, 15, 16, 28):
        expected = pydicom.dcmread(originals[frame - 1]).pixel_array
        assert np.array_equal(picture(tmp_path, frame).values, expected)
    assert np.array_equal(picture(tmp_path).values, pydicom.dcmread(originals[13]).pixel_array)
    with pytest.raises(Unusable, match="no-such-frame"):
        picture(tmp_path, 29)


@pytest.mark.parametrize("gone", range(2, 28))
def test_a_slice_of_the_real_head_that_is_gone_is_noticed(shared_data, tmp_path, gone):
    """Its spacing is uneven: 4.0 mm, once 1.1 mm, then 7.0 mm."""
    for path in (shared_data / "ct_head_series").glob("*.dcm"):
        if path.name != f"{gone:02}.dcm":
            shutil.copyfile(path, tmp_path / path.name)
    if gone in (14, 15):
        picture(tmp_path)  # without one side of the small step no position could tell
    else:
        assert reason(tmp_path) is SkipReason.MISSING_SLICES


def test_equal_steps_of_any_size_have_no_gap(tmp_path):
    picture(series(tmp_path / "thin", [10.0 * n for n in range(9)], thickness=1))
    picture(series(tmp_path / "overlap", [2.5 * n for n in range(9)], thickness=5))
    picture(series(tmp_path / "unknown", [3.0 * n for n in range(9)], thickness=0))
    picture(series(tmp_path / "two", [0.0, 40.0]))


@pytest.mark.parametrize("thickness", [0, 1, 5, 10])
def test_a_gap_is_noticed_whatever_the_thickness(tmp_path, thickness):
    places = [5.0 * n for n in range(12) if n != 6]
    assert reason(series(tmp_path / "s", places, thickness=thickness)) is SkipReason.MISSING_SLICES


def test_what_is_no_series_is_named(tmp_path):
    places = [4.0 * n for n in range(5)]
    assert reason(series(tmp_path / "twice", [*places, 8.0])) is SkipReason.REPEATED_SLICES
    two = series(tmp_path / "two", places)
    series(two, [100.0], names=["x.dcm"], uid="1.2.9")
    assert reason(two) is SkipReason.SEVERAL_SERIES
    turned = series(tmp_path / "turned", places)
    series(turned, [30.0], names=["scout.dcm"], orientation=[1, 0, 0, 0, 1, 0])
    assert reason(turned) is SkipReason.SEVERAL_SERIES
    nowhere = series(tmp_path / "nowhere", places)
    (nowhere / "x.dcm").write_bytes(dicom(np.zeros((6, 6), np.uint8), SeriesInstanceUID="1.2.3"))
    assert reason(nowhere) is SkipReason.INCONSISTENT
    (tmp_path / "empty").mkdir()
    assert reason(tmp_path / "empty") is SkipReason.EMPTY
    (tmp_path / "empty" / "a.txt").write_text("nothing")
    assert reason(tmp_path / "empty") is SkipReason.NO_PIXELS


def test_a_link_in_a_series_is_not_followed(tmp_path):
    folder = series(tmp_path / "s", [0.0, 4.0, 8.0])
    outside = series(tmp_path / "outside", [12.0], names=["secret.dcm"])
    (folder / "link.dcm").symlink_to(outside / "secret.dcm")
    with pytest.raises(Unusable, match="no-such-frame"):
        picture(folder, 4)


@pytest.fixture
def hospital(tmp_path):
    """A manifest that mixes everything, and the pixels expected of each row."""
    data, rng = tmp_path / "data", np.random.default_rng(7)
    data.mkdir()
    grey = rng.integers(0, 256, (12, 12), dtype=np.uint8)
    film = rng.integers(0, 256, (5, 12, 12), dtype=np.uint8)
    deep = (rng.permutation(144).reshape(12, 12) * 400).astype(np.uint16)
    shades = np.rint((deep / deep.max()) * 255)
    Image.fromarray(grey).save(data / "a.png")
    Image.fromarray(grey[::-1]).save(data / "b.dcm", format="PNG")  # the name says something else
    (data / "c.jpg").write_bytes(dicom(grey.T))
    (data / "1.2.840.7").write_bytes(dicom(film, frames=5))
    Image.fromarray(deep).save(data / "deep.png")
    Image.fromarray(deep).save(data / "deep.tif")
    (data / "deep").write_bytes(dicom(deep))
    volume = (np.arange(12 * 12 * 3).reshape(12, 12, 3) % 251).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), data / "brain.nii.gz")
    (data / "brain.nii.gz").rename(data / "brain")
    series(data / "ct", [4.0 * n for n in range(5)], Rows=6)
    rows = [
        ("a.png", "", "ill", grey),
        ("b.dcm", "", "well", grey[::-1]),
        ("c.jpg", "", "ill", grey.T),
        ("1.2.840.7", "", "well", film[2]),
        ("1.2.840.7", "5", "well", film[4]),
        ("deep.png", "", "ill", shades),
        ("deep.tif", "9", "ill", shades),  # one picture: the column says nothing about it
        ("deep", "", "ill", shades),
        ("brain", "2", "well", volume[::-1, ::-1, 1].T * (255 / 250)),
        ("ct", "5.0", "ill", np.full((12, 12), 4)),
    ]
    lines = ["path,slice,label,patient"]
    lines += [f"{path},{frame},{label},p{row}" for row, (path, frame, label, _) in enumerate(rows)]
    (data / "scans.csv").write_text("\n".join(lines) + "\n")
    return data / "scans.csv", {f"p{row}": pixels for row, (_, _, _, pixels) in enumerate(rows)}


@pytest.mark.parametrize("cached", [False, True])
def test_one_manifest_may_mix_all_formats(hospital, read, tmp_path, cached):
    path, expected = hospital
    for _ in range(2):
        images = read(path, cache=tmp_path / "cache" if cached else None)
        assert images.skipped == ()
        train = images.train
        seen = {train.unit_ids[unit]: train.inputs["image"][row, 0] for row, unit in enumerate(train.units)}
        assert seen.keys() == expected.keys()
        for patient, pixels in expected.items():
            assert np.abs(seen[patient].astype(float) - pixels).max() <= 1, patient


def test_the_check_says_which_formats_there_are_and_what_is_wrong(hospital):
    path, _ = hospital
    with path.open("a") as file:
        file.write("1.2.840.7,6,well,p20\nbrain,9,ill,p21\nbroken.dcm,,ill,p22\nreport.dcm,,ill,p23\n")
    whole = dicom(np.zeros((9, 9), np.uint16))
    (path.parent / "broken.dcm").write_bytes(whole[:-20])
    (path.parent / "report.dcm").write_bytes(
        whole[: whole.index(b"\x28\0\x02\0")].replace(b".4.1.1.2", b".4.1.1.88")
    )
    checkup = check_images(
        DataConfig(path=str(path)),
        preprocessing=Preprocessing(image_size=12, channels=1),
        classes=None,
        cache_folder=None,
    )
    rows = {check: result for check, result, _ in checkup.rows()}
    assert rows["formats"] == "DICOM 7, PNG 3, NIfTI 2, TIFF 1, DICOM series 1"
    assert rows["skipped: no-such-frame"] == "2: 1.2.840.7 (frame 6), brain (frame 9)"
    assert rows["skipped: truncated"] == "1: broken.dcm"
    assert rows["skipped: no-pixel-data"] == "1: report.dcm"


def test_a_frame_column_of_another_meaning_is_left_alone(tmp_path, read):
    Image.new("L", (12, 12), 7).save(tmp_path / "a.png")
    Image.new("L", (12, 12), 9).save(tmp_path / "b.png")
    table = tmp_path / "scans.csv"
    Image.new("L", (12, 12), 11).save(tmp_path / "c.png")
    table.write_text("path,label,frame\na.png,ill,metal\nb.png,well,3\nc.png,ill,\n")
    assert read(table).skipped == ()
    images = read(table, frame_column="frame", max_skipped_share=0.9)
    assert [entry.reason for entry in images.skipped] == [SkipReason.NO_SUCH_FRAME]


def test_folders_may_hold_any_format_under_any_name(tmp_path, read):
    for label in ("ill", "well"):
        (tmp_path / label).mkdir()
    (tmp_path / "ill" / "1.2.840.113.4").write_bytes(dicom(np.full((12, 12), 40, np.uint8)))
    (tmp_path / "ill" / "IM0001").write_bytes(dicom(np.full((12, 12), 50, np.uint8)))
    (tmp_path / "well" / "x.dcm").write_bytes(dicom(np.full((12, 12), 60, np.uint8)))
    (tmp_path / "well" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 40)
    (tmp_path / "well" / "readme.md").write_text("# about")
    images = read(tmp_path)
    assert images.counts["train"] == {"ill": 2, "well": 1}
    assert {(entry.path, entry.reason) for entry in images.skipped} == {
        ("well/DICOMDIR", "other-file"), ("well/readme.md", "other-file"),
    }  # fmt: skip
