import io
import zipfile

import numpy as np
import pytest

from client.images.layout import find_records
from client.images.records import SkipReason
from common.errors import DataError
from common.hospital_config import DataConfig


def save(path, **changes):
    rng = np.random.default_rng(3)
    arrays = {}
    for split, rows in (("train", 6), ("val", 3), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (rows, 12, 12), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(rows) % 2).astype(np.uint8)
    arrays |= changes
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if value is not None})
    return arrays


@pytest.mark.parametrize("label_shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("label_type", [np.uint8, np.int64, np.float32, np.bool_, np.str_])
def test_labels_of_either_shape_and_any_type(tmp_path, read, label_shape, label_type):
    labels = (np.arange(6) % 2).astype(label_type).reshape(label_shape)
    arrays = save(tmp_path / "a.npz", train_labels=labels)
    images = read(tmp_path / "a.npz")
    assert images.train.targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert np.array_equal(images.train.inputs["image"][:, 0], arrays["train_images"])
    assert (images.train.num_rows, images.validation.num_rows, images.test.num_rows) == (6, 3, 3)
    assert images.classes == ("0", "1")
    assert images.unit == "image"
    assert images.layout == "MedMNIST .npz"


def test_colour_images_become_what_the_model_takes(tmp_path, read):
    rng = np.random.default_rng(0)
    colour = {f"{s}_images": rng.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8) for s in ("train",)}
    arrays = save(tmp_path / "a.npz", **colour, val_images=None, test_images=None)
    kept = read(tmp_path / "a.npz", channels=3).train.inputs["image"]
    assert np.array_equal(kept, arrays["train_images"].transpose(0, 3, 1, 2))
    assert read(tmp_path / "a.npz", channels=1).train.inputs["image"].shape == (6, 1, 12, 12)
    assert read(tmp_path / "a.npz", channels=3, size=20).train.inputs["image"].shape == (6, 3, 20, 20)


def test_the_content_decides_not_the_name(tmp_path, read):
    save(tmp_path / "a.npz")
    (tmp_path / "a.npz").rename(tmp_path / "export.dat")
    assert read(tmp_path / "export.dat").train.num_rows == 6


def test_a_folder_with_one_archive_is_that_archive(tmp_path, read):
    save(tmp_path / "a.npz")
    assert read(tmp_path).train.num_rows == 6


def test_equal_pictures_are_one_unit(tmp_path, read):
    pictures = np.random.default_rng(0).integers(0, 256, (6, 12, 12), dtype=np.uint8)
    pictures[4] = pictures[1]
    save(tmp_path / "a.npz", train_images=pictures)
    train = read(tmp_path / "a.npz").train
    assert (train.num_rows, train.num_units) == (6, 5)
    assert train.targets[train.units == 1].tolist() == [1, 0]  # rows 1 and 4


def test_patients_and_sites_are_understood(tmp_path, read):
    people = {
        "train_patients": np.array(["a", "a", "b", "b", "c", "c"]),
        "val_patients": np.array(["d", "d", "e"]),
        "test_patients": np.array(["f", "g", "g"]),
        "train_sites": np.array(["north"] * 4 + ["south"] * 2),
        "val_sites": np.array(["south"] * 3),
        "test_sites": np.array(["north"] * 3),
        "train_boxes": np.zeros((6, 3, 4)),
    }
    save(tmp_path / "a.npz", **people)
    images = read(tmp_path / "a.npz")
    assert images.unit == "patient"
    assert images.train.unit_ids == ("a", "b", "c")
    assert images.test.unit_ids == ("f", "g")
    records = find_records(DataConfig(path=str(tmp_path / "a.npz")))
    assert dict(records.groups) == {"site": ("north",) * 4 + ("south",) * 5 + ("north",) * 3}


def test_patients_of_some_splits_only_would_protect_images_only(tmp_path, read):
    save(tmp_path / "a.npz", train_patients=np.array(list("aabbcc")))
    with pytest.raises(DataError, match="patients of some splits"):
        read(tmp_path / "a.npz")


def test_an_image_without_a_patient_is_listed(tmp_path, read):
    names = {"val_patients": np.array(list("xyz")), "test_patients": np.array(list("uvw"))}
    save(tmp_path / "a.npz", train_patients=np.array(["a", "", "b", "b", "c", "c"]), **names)
    images = read(tmp_path / "a.npz", max_skipped_share=0.5)
    assert [(s.path, s.reason) for s in images.skipped] == [("train_images[1]", SkipReason.BLANK_PATIENT)]


def test_a_label_beyond_the_classes_is_listed(tmp_path, read):
    save(tmp_path / "a.npz", train_labels=np.array([0, 1, 2, 0, 1, 0]))
    images = read(tmp_path / "a.npz", classes=("normal", "ill"), max_skipped_share=0.5)
    assert [(s.path, s.reason) for s in images.skipped] == [("train_images[2]", SkipReason.UNKNOWN_LABEL)]
    assert images.counts["train"] == {"normal": 3, "ill": 2}


def test_an_archive_that_names_its_classes_is_read_by_those_names(tmp_path, read):
    save(tmp_path / "a.npz", classes=np.array(["ill", "normal"]))
    assert read(tmp_path / "a.npz").classes == ("ill", "normal")
    swapped = read(tmp_path / "a.npz", classes=("normal", "ill"))
    assert swapped.train.targets.tolist() == [1, 0, 1, 0, 1, 0]


class Trap:
    def __reduce__(self):
        return (exit, (3,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_labels": np.array([Trap()] * 6, dtype=object)}, "pickled"),
        ({"train_images": np.zeros((6, 12, 12), np.float32)}, "float32"),
        ({"train_images": np.zeros((6, 12, 12, 12), np.uint8)}, "12, 12, 12"),
        ({"train_images": np.zeros((6, 9, 9), np.uint8)}, "different sizes"),
        ({"train_labels": np.zeros((6, 14), np.uint8)}, "several labels for one image"),
        ({"train_labels": np.full((6, 14), 2, np.uint8)}, r"\(6, 14\)"),
        ({"train_labels": np.zeros(5, np.uint8)}, r"\(5,\)"),
        ({"train_labels": None}, "no train_labels"),
        ({"train_images": None, "val_images": None, "test_images": None}, "no images"),
        ({"train_labels": np.zeros(6), "val_labels": np.zeros(3), "test_labels": np.zeros(3)}, "1 class"),
        ({"unit": np.array("household")}, "household"),
    ],
)
def test_other_content_is_refused_in_words(tmp_path, read, changes, said):
    save(tmp_path / "a.npz", **changes)
    with pytest.raises(DataError, match=said) as refusal:
        read(tmp_path / "a.npz")
    assert refusal.value.fix


def test_a_damaged_archive_is_refused(tmp_path, read):
    save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-200])
    (tmp_path / "flipped.npz").write_bytes(whole[:300] + bytes(40) + whole[340:])
    for name in ("cut.npz", "flipped.npz"):
        with pytest.raises(DataError):
            read(tmp_path / name)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path, read):
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 28, 28)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("train_images.npy", header.getvalue())
    with pytest.raises(DataError, match="cut off"):
        read(tmp_path / "bomb.npz")


def test_images_above_the_pixel_limit_are_refused(tmp_path, read):
    save(tmp_path / "a.npz")
    with pytest.raises(DataError, match="100 pixels"):
        read(tmp_path / "a.npz", max_pixels=100)
