import numpy as np
import pytest

from client.images.layout import find_records
from client.images.records import SkipReason
from common.errors import DataError
from common.hospital_config import DataConfig


def fill(root, draw, *, splits=("train", "test"), classes=("ill", "normal"), each=3):
    number = 0
    for split in splits:
        for name in classes:
            for index in range(each):
                draw(root / split / name / f"{index}.png", number)
                number += 1


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("Training", "train"), ("val", "validation"), ("valid", "validation"),
     ("validation", "validation"), ("test", "test"), ("TEST", "test")],
)  # fmt: skip
def test_split_folders_go_by_their_usual_names(tmp_path, draw, read, name, split):
    fill(tmp_path, draw, splits=(name,))
    images = read(tmp_path)
    assert images.classes == ("normal", "ill")  # the finding last, whatever the alphabet says
    assert images.counts[split] == {"normal": 3, "ill": 3}
    assert images.layout == "folders split/class/*"
    assert images.unit == "image"


def test_pictures_arrive_unchanged_with_their_label(tmp_path, draw, read, pixels):
    fill(tmp_path, draw)
    train = read(tmp_path).train
    assert np.array_equal(train.inputs["image"][:, 0], np.stack([pixels(n) for n in range(6)]))
    assert train.targets.tolist() == [1, 1, 1, 0, 0, 0]


def test_class_folders_without_splits_all_train(tmp_path, draw, read):
    fill(tmp_path, draw, splits=("",))
    images = read(tmp_path)
    assert (images.train.num_rows, images.test.num_rows) == (6, 0)
    assert images.layout == "folders class/*"


def test_deeper_folders_are_searched_and_other_files_named(tmp_path, draw, read):
    fill(tmp_path, draw, splits=("",))
    draw(tmp_path / "ill" / "2019" / "may" / "x.png", 50)
    (tmp_path / "ill" / "notes.txt").write_text("not a picture")
    (tmp_path / "ill" / ".DS_Store").write_text("hidden")
    images = read(tmp_path, max_skipped_share=0.0)
    assert images.train.num_rows == 7
    assert [(s.path, s.reason) for s in images.skipped] == [("ill/notes.txt", SkipReason.OTHER_FILE)]


def test_what_a_file_is_its_content_says(tmp_path, draw, read, pixels):
    fill(tmp_path, draw, splits=("",))
    draw(tmp_path / "ill" / "x.jpg", 70, format="PNG")
    draw(tmp_path / "ill" / "y", 71, format="BMP")
    images = read(tmp_path)
    shown = [image[0].tobytes() for image in images.train.inputs["image"]]
    assert pixels(70).tobytes() in shown
    assert pixels(71).tobytes() in shown


def test_the_same_picture_in_two_formats_is_one_unit(tmp_path, draw, read):
    fill(tmp_path, draw, splits=("",))
    draw(tmp_path / "ill" / "again.bmp", 1, format="BMP")
    images = read(tmp_path)
    assert (images.train.num_rows, images.train.num_units, images.repeated_images) == (7, 6, 1)


def test_a_hospital_with_one_class_takes_the_federations(tmp_path, draw, read):
    fill(tmp_path, draw, splits=("",), classes=("Normal",))
    assert read(tmp_path, classes=("normal", "ill")).counts["train"] == {"normal": 3, "ill": 0}
    with pytest.raises(DataError, match="1 class"):
        read(tmp_path)


def test_folders_of_no_class_say_what_was_expected(tmp_path, draw, read):
    fill(tmp_path, draw)
    with pytest.raises(DataError, match="classes") as refusal:
        read(tmp_path, classes=("cat", "dog"))
    assert "cat, dog" in str(refusal.value)
    assert "ill, normal" in str(refusal.value)


def table(root, text):
    (root / "labels.csv").write_text(text)


def test_a_table_beside_the_folders_names_the_patients(tmp_path, draw, read):
    fill(tmp_path, draw)
    rows = [
        f"{split}/{name}/{i}.png,{split}-p{min(i, 1)},scanner-{i}"
        for split in ("train", "test")
        for name in ("ill", "normal")
        for i in range(3)
    ]
    table(tmp_path, "\n".join(["path,patient_id,scanner", *rows]))
    images = read(tmp_path)
    assert images.unit == "patient"
    assert images.train.unit_ids == ("train-p0", "train-p1")
    assert images.train.unit_rows.offsets.tolist() == [0, 2, 6]
    assert "labels.csv (patient_id)" in images.layout
    records = find_records(DataConfig(path=str(tmp_path)))
    assert set(records.groups) == {"scanner"}


def test_bare_file_names_match_where_they_are_unique(tmp_path, draw, read):
    for number, name in enumerate(("a", "b", "c")):
        draw(tmp_path / "ill" / f"{name}.png", number)
        draw(tmp_path / "normal" / f"n{name}.png", number + 10)
    table(tmp_path, "file;Patient ID\na.png;1\nb.png;1\nc.png;2\nna.png;3\nnb.png;3\nnc.png;4\n")
    assert read(tmp_path).train.num_units == 4


def test_an_image_that_the_table_leaves_out_is_skipped(tmp_path, draw, read):
    fill(tmp_path, draw, splits=("",))
    rows = [f"ill/{i}.png,p{i}" for i in range(3)] + ["normal/0.png,p8", "normal/1.png,"]
    table(tmp_path, "\n".join(["path,patient", *rows]))
    images = read(tmp_path, max_skipped_share=0.5)
    assert [(s.path, s.reason) for s in images.skipped] == [
        ("normal/1.png", SkipReason.BLANK_PATIENT),
        ("normal/2.png", SkipReason.BLANK_PATIENT),
    ]


def test_a_table_that_fits_no_image_is_refused_not_ignored(tmp_path, draw, read):
    fill(tmp_path, draw)
    table(tmp_path, "path,patient\nelsewhere/1.png,p1\nelsewhere/2.png,p2\n")
    with pytest.raises(DataError, match="names none of the images"):
        read(tmp_path)
    table(tmp_path, "path,finding\nelsewhere/1.png,p1\n")
    with pytest.raises(DataError, match="no table"):
        read(tmp_path, patient_column="mrn")


@pytest.mark.parametrize("content", ["", "only text"])
def test_an_unknown_folder_or_file_is_refused(tmp_path, read, content):
    (tmp_path / "empty").mkdir()
    (tmp_path / "thing.bin").write_bytes(b"\x00\x01\x02" + content.encode())
    (tmp_path / "thing.txt").write_text(content)
    for path in ("empty", "thing.bin", "thing.txt", "nowhere"):
        with pytest.raises(DataError) as refusal:
            read(tmp_path / path)
        assert refusal.value.fix
