"""What is read of a header, against pydicom and nibabel by hand, on the real samples."""

import csv
import json
import warnings

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from client.doctor.facts import Facts, read_facts
from client.images.decode import guarded_pillow
from tests.client.doctor.films import film, save, save_dicom

LIMIT = 50_000_000


def facts(path):
    with guarded_pillow(LIMIT):
        return read_facts(str(path), max_pixels=LIMIT)


@pytest.fixture(scope="module")
def dicom_samples(shared_data):
    with (shared_data / "dicom_samples" / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [(shared_data / "dicom_samples" / row["file"], row) for row in rows]


def test_every_dicom_sample_says_what_the_index_says(dicom_samples):
    compared = 0
    for path, row in dicom_samples:
        found = facts(path)
        if row["rows"] and found.format == "DICOM":
            bits = row["bits"].split("/")
            assert (found.height, found.width) == (int(row["rows"]), int(row["cols"])), path.name
            assert found.bits == int(bits[1] or bits[0]), path.name
            assert found.colours == row["photometric"], path.name
            assert found.modality in (row["modality"], "other"), path.name
            compared += 1
    assert compared > 85


def test_spacing_and_names_as_pydicom_has_them(dicom_samples):
    spaced = named = 0
    for path, _ in dicom_samples:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, force=True, stop_before_pixels=True)
            stated = header.get("PixelSpacing") or header.get("ImagerPixelSpacing")
            name = str(header.get("PatientName") or "")
        found = facts(path)
        if found.format != "DICOM":
            continue
        if stated and min(stated) > 0:
            assert found.spacing == pytest.approx([float(value) for value in stated]), path.name
            spaced += 1
        if len(name.strip("^ ")) > 5 and "anon" not in name.lower():
            assert "PatientName" in found.direct, path.name
            named += 1
    assert spaced > 30
    assert named > 30


def test_spacing_in_a_functional_group(shared_data):
    path = shared_data / "dicom_samples" / "eCT_Supplemental.dcm"
    [measures] = pydicom.dcmread(path).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert facts(path).spacing == pytest.approx([float(value) for value in measures.PixelSpacing])


def test_nifti_spacing_is_that_of_the_axial_slice(shared_data):
    with (shared_data / "nifti_samples" / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        found = facts(shared_data / "nifti_samples" / row["file"])
        x, y = json.loads(row["zooms"])[:2]
        assert found.spacing == pytest.approx((y, x)), row["file"]
        assert (found.width, found.height) == tuple(int(n) for n in row["shape"].strip("()").split(",")[:2])
    assert len(rows) == 8


def test_nifti_axes_that_are_stored_in_another_order(tmp_path):
    turned = np.array([[0, 0, 3.0, 0], [2.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])  # stored: y, z, x
    image = nibabel.Nifti1Image(np.zeros((5, 6, 7), np.int16), turned)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "a.nii")
    found = facts(tmp_path / "a.nii")
    assert (found.width, found.height, found.spacing, found.bits) == (7, 5, (2.0, 3.0), 16)


def test_depth_and_mode_of_pictures(tmp_path):
    save(tmp_path / "a.png", (film(1).astype(np.uint16) << 8))
    save(tmp_path / "b.tif", np.zeros((4, 6), np.float32))
    save(tmp_path / "c.jpg", np.stack([film(1)] * 3, axis=-1))
    seen = {name: facts(tmp_path / name) for name in ("a.png", "b.tif", "c.jpg")}
    assert [seen[name].bits for name in seen] == [16, 32, 8]
    assert seen["c.jpg"].colours == "RGB"
    assert (seen["b.tif"].width, seen["b.tif"].height) == (6, 4)


def test_a_deflated_header_is_read_and_a_damaged_one_is_left_out(tmp_path):
    plain = save_dicom(tmp_path / "a.dcm", film(1), PatientName="Doe^Jane", PixelSpacing=[0.3, 0.3])
    dataset = pydicom.dcmread(plain)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(tmp_path / "deflated.dcm", dataset)
    assert facts(tmp_path / "deflated.dcm").spacing == (0.3, 0.3)
    assert facts(tmp_path / "deflated.dcm").direct == {"PatientName"}
    for cut in range(0, plain.stat().st_size, 97):
        (tmp_path / "cut.dcm").write_bytes(plain.read_bytes()[:cut])
        assert isinstance(facts(tmp_path / "cut.dcm"), Facts)
    noise = np.random.default_rng(0)
    whole = bytearray(plain.read_bytes())
    for _ in range(200):
        broken = whole.copy()
        for place in noise.integers(132, 900, 6):
            broken[place] = noise.integers(256)
        (tmp_path / "cut.dcm").write_bytes(broken)
        assert isinstance(facts(tmp_path / "cut.dcm"), Facts)


def test_an_unreadable_picture_has_no_facts(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert facts(tmp_path / "a.png") == Facts(format="PNG")
    Image.fromarray(film(1)).save(tmp_path / "b.png")
    assert facts(tmp_path / "b.png").width == 64
