"""What a simulation hands to one hospital."""

import stat

import numpy as np
import pytest

from client.images.dataset import read_records
from client.images.decoded import decode_records
from client.images.parts import write_part
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing

ROWS = [
    (
        f"planted-image-{n}.png",
        ("ill", "normal")[n % 2],
        f"planted-patient-{n % 7}",
        ("north", "south")[n % 7 % 2],
    )
    for n in range(20)
]


@pytest.fixture
def decoded(manifest):
    data = DataConfig(path=str(manifest(("path", "label", "patient", "site"), ROWS)))
    return decode_records(
        read_records(data, classes=None),
        preprocessing=Preprocessing(image_size=9, channels=1),
        cache_folder=None,
        max_pixels=data.max_pixels,
        max_skipped_share=data.max_skipped_share,
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_part_reads_back_as_it_was(manifest, read, tmp_path, channels):
    data = DataConfig(path=str(manifest(("path", "label", "patient", "site"), ROWS)))
    everything = decode_records(
        read_records(data, classes=None),
        preprocessing=Preprocessing(image_size=9, channels=channels),
        cache_folder=tmp_path / "cache",
        max_pixels=data.max_pixels,
        max_skipped_share=0,
    ).examples
    train, validation = everything.select_units([0, 2, 4]), everything.select_units([5, 1])
    path = write_part(
        tmp_path / "hospital" / "images.npz",
        train=train,
        validation=validation,
        classes=("normal", "ill"),
        unit="patient",
    )
    again = read(path, classes=("normal", "ill"), size=9, channels=channels)
    for written, found in ((train, again.train), (validation, again.validation)):
        assert np.array_equal(written.inputs["image"], found.inputs["image"])
        assert np.array_equal(written.targets, found.targets)
        assert np.array_equal(written.units, found.units)
    assert again.test.num_rows == 0
    assert again.unit == "patient"
    assert again.skipped == ()


def test_a_part_holds_no_patient_and_no_file_name(decoded, tmp_path):
    path = write_part(tmp_path / "p.npz", train=decoded.examples, classes=decoded.classes, unit=decoded.unit)
    content = path.read_bytes()
    for encoding in ("utf-8", "utf-32-le", "utf-16-le"):
        assert "planted".encode(encoding) not in content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_names_of_units_depend_on_the_key(decoded, read, tmp_path):
    def names(number, key):
        path = tmp_path / f"{number}.npz"
        write_part(path, train=decoded.examples, classes=decoded.classes, unit=decoded.unit, key=key)
        return read(path, size=9).train.unit_ids

    assert names(1, b"a" * 32) == names(2, b"a" * 32) != names(3, b"b" * 32)
    assert names(4, None) != names(5, None)
    assert len(set(names(6, None))) == 7


def test_images_without_patients_stay_images(tmp_path, draw, read):
    for number in range(6):
        draw(tmp_path / "data" / ("ill" if number % 2 else "normal") / f"{number}.png", number % 5)
    images = read(tmp_path / "data", size=9)
    path = write_part(tmp_path / "p.npz", train=images.train, classes=images.classes, unit=images.unit)
    again = read(path, size=9)
    assert again.unit == "image"
    assert np.array_equal(again.train.units, images.train.units)
    assert (again.train.num_rows, again.train.num_units) == (6, 5)


def test_a_simulation_can_partition_by_a_column_of_the_patients(decoded):
    site_of = dict(zip(decoded.examples.unit_ids, decoded.unit_groups("site"), strict=True))
    assert site_of == {row[2]: row[3] for row in ROWS}
    assert not decoded.names_a_split
    assert decoded.split("train").num_units == 7
    assert decoded.split("test").num_units == 0
    with pytest.raises(KeyError):
        decoded.unit_groups("ward")


def test_a_patient_at_two_sites_belongs_to_the_one_with_most_images(manifest):
    rows = [("a.png", "ill", "p", "x"), ("b.png", "normal", "p", "y"), ("c.png", "ill", "p", "y"),
            ("d.png", "ill", "q", "z"), ("e.png", "ill", "q", "w")]  # fmt: skip
    data = DataConfig(path=str(manifest(("path", "label", "patient", "site"), rows)))
    decoded = decode_records(
        read_records(data, classes=None),
        preprocessing=Preprocessing(image_size=9, channels=1),
        cache_folder=None,
        max_pixels=10**6,
        max_skipped_share=0,
    )
    assert decoded.unit_groups("site") == ("y", "w")


def test_the_images_of_a_part_are_mapped_not_copied(decoded, read, tmp_path):
    train = decoded.examples
    path = write_part(
        tmp_path / "images.npz", train=train, classes=decoded.classes, unit="patient", key=b"k" * 32
    )
    pixels = read(path, classes=decoded.classes, size=9, channels=1).train.inputs["image"]
    place = pixels
    while isinstance(place, np.ndarray) and not isinstance(place, np.memmap):
        place = place.base
    assert isinstance(place, np.memmap)
    assert not pixels.flags.writeable
    assert np.array_equal(pixels, train.select_units(range(train.num_units)).inputs["image"])
