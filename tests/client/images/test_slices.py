"""Volumes as series of slices: DICOM series, NIfTI volumes and cines, against pydicom and nibabel by hand."""

import shutil

import nibabel
import numpy as np
import pydicom
import pytest

from client.images.dataset import read_hospital_images
from client.images.records import SkipReason
from client.images.series_rows import evenly_spread
from common.errors import DataError
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing
from common.series_form import SeriesForm
from tests.client.images.medical_files import dicom, nifti
from tests.client.images.test_series import series


def read(path, *, steps=4, size=6, cache=None, **settings):
    return read_hospital_images(
        DataConfig(path=str(path), **settings),
        preprocessing=Preprocessing(image_size=size, channels=1),
        classes=None,
        cache_folder=cache,
        form=SeriesForm(kind="slices", steps=steps),
    )


def test_the_real_head_is_its_slices_from_one_end_to_the_other(shared_data, tmp_path):
    head = tmp_path / "data" / "head"
    head.mkdir(parents=True)
    originals = sorted((shared_data / "ct_head_series").glob("*.dcm"))
    for number, path in enumerate(reversed(originals)):
        shutil.copyfile(path, head / f"{number:02}.dcm")
    (tmp_path / "data" / "list.csv").write_text("path,label,patient\nhead,ill,anna\nhead/00.dcm,well,bo\n")
    images = read(tmp_path / "data" / "list.csv", steps=5, size=512, cache=tmp_path / "cache")
    rows = {images.train.unit_ids[unit]: row for row, unit in enumerate(images.train.units)}
    shown = images.train.inputs["image"][rows["anna"], :, 0].astype(int)
    by_hand = [pydicom.dcmread(path) for path in originals]
    by_hand.sort(key=lambda slice: _along_normal(slice))
    for picture, place in zip(shown, (0, 7, 14, 20, 27), strict=True):
        slice = by_hand[place]
        values = slice.pixel_array * float(slice.RescaleSlope) + float(slice.RescaleIntercept)
        level, width = (float(np.ravel(v)[0]) for v in (slice.WindowCenter, slice.WindowWidth))
        expected = np.clip((values - (level - 0.5)) / (width - 1) + 0.5, 0, 1) * 255
        assert np.abs(picture - expected).max() <= 1, place
    assert images.train.inputs["present"].sum(axis=1).tolist() == [5, 1]
    assert not images.train.inputs["years"].any()


def _along_normal(slice):
    across, down = np.array(slice.ImageOrientationPatient, float).reshape(2, 3)
    return float(np.cross(across, down) @ np.array(slice.ImagePositionPatient, float))


def test_a_nifti_volume_is_its_axial_slices(tmp_path):
    random = np.random.default_rng(0)
    for label in ("ill", "well"):
        (tmp_path / label).mkdir()
        voxels = random.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        (tmp_path / label / "brain.nii").write_bytes(nifti(voxels))
        if label == "ill":
            ill = voxels
    images = read(tmp_path)
    assert images.unit == "image"
    assert images.train.num_units == 2
    row = images.train.targets.tolist().index(images.classes.index("ill"))
    span = np.quantile(ill, (0, 1))
    for place in range(3):
        canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(ill, np.eye(4)))
        expected = np.asarray(canonical.dataobj)[:, :, place].T[::-1, ::-1]
        found = images.train.inputs["image"][row, place, 0]
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.995, (place, span)
    assert images.train.inputs["present"][row].tolist() == [1, 1, 1, 0]


def test_files_of_one_series_in_a_folder_are_one_volume_and_a_cine_is_its_frames(tmp_path):
    series(tmp_path / "ill" / "scan", [4.0 * n for n in range(7)], names=[f"{c}.dcm" for c in "gfbacde"])
    (tmp_path / "well").mkdir()
    frames = np.stack([np.full((6, 6), 10 * n, np.uint8) for n in range(3)])
    (tmp_path / "well" / "cine.dcm").write_bytes(dicom(frames, frames=3))
    images = read(tmp_path, steps=3)
    assert images.train.num_rows == 2
    ill = images.train.targets.tolist().index(images.classes.index("ill"))
    held = images.train.inputs["image"][:, :, 0, 0, 0]
    order = np.argsort(held[ill])
    assert order.tolist() == [0, 1, 2]
    assert images.train.inputs["present"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_a_broken_volume_is_named_once_and_left_out(tmp_path):
    series(tmp_path / "ill" / "whole", [4.0 * n for n in range(4)], uid="1.2")
    series(tmp_path / "well" / "gap", [0, 4, 8, 24, 28], uid="1.3")
    series(tmp_path / "well" / "also", [4.0 * n for n in range(4)], uid="1.4", InstitutionName="B")
    images = read(tmp_path, max_skipped_share=0.5)
    assert [(entry.path, entry.reason) for entry in images.skipped] == [
        ("well/gap", SkipReason.MISSING_SLICES)
    ]
    assert images.train.num_rows == 2


def test_a_patient_with_two_volumes_is_one_unit(tmp_path):
    for number, name in enumerate(("first", "second", "third")):
        series(tmp_path / name, [4.0 * n for n in range(4)], uid=f"1.{number}", AccessionNumber=name)
    lines = ["path,label,patient", "first,ill,anna", "second,well,anna", "third,well,bo"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    images = read(tmp_path / "list.csv")
    assert images.train.num_rows == 3
    assert images.train.unit_ids == ("anna", "bo")
    assert images.train.units.tolist() == [0, 0, 1]


def test_arrays_hold_no_volumes(tmp_path):
    pixels = np.zeros((2, 6, 6), np.uint8)
    np.savez(tmp_path / "a.npz", train_images=pixels, train_labels=np.array([0, 1]))
    with pytest.raises(DataError, match="no volumes"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize(("count", "most"), [(1, 4), (4, 4), (28, 5), (100, 16), (7, 1)])
def test_slices_are_spread_evenly_from_the_first_to_the_last(count, most):
    places = evenly_spread(count, most)
    assert len(places) == min(count, most)
    assert (np.diff(places) > 0).all()
    if most > 1:
        assert places[0] == 0
        assert places[-1] == count - 1
        assert np.ptp(np.diff(places)) <= 1 if count > 1 else True
