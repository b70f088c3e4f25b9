import numpy as np
import pytest

from client.images.dataset import read_records
from client.images.records import SkipReason
from client.images.tables import read_table
from common.errors import DataError
from common.hospital_config import DataConfig

ROWS = [
    ("a.png", "ill", "p1", "train", "north"),
    ("b.png", "normal", "p2", "train", "north"),
    ("c.png", "ill", "p1", "train", "south"),
    ("d.png", "normal", "p3", "val", "south"),
    ("sub/e.png", "ill", "p4", "test", "south"),
]
HEADER = ("path", "label", "patient", "split", "site")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_any_usual_table_is_read(manifest, read, pixels, delimiter, encoding):
    images = read(manifest(HEADER, ROWS, delimiter=delimiter, encoding=encoding))
    assert images.train.unit_ids == ("p1", "p2")
    assert images.validation.unit_ids == ("p3",)
    assert images.test.unit_ids == ("p4",)
    assert images.classes == ("normal", "ill")
    assert images.counts["train"] == {"normal": 1, "ill": 2}
    # Unit by unit: both images of p1 (a, c), then p2 (b).
    assert np.array_equal(images.train.inputs["image"][:, 0], np.stack([pixels(n) for n in (0, 2, 1)]))


@pytest.mark.parametrize(
    "header",
    [
        ("Image Index", "Finding Labels", "Patient ID", "Set", "site"),
        ("filename", "Diagnosis", "subject_id", "fold", "site"),
        ("FILE", "class", "PatientId", "subset", "site"),
    ],
)
def test_columns_are_found_by_their_usual_names(manifest, read, header):
    images = read(manifest(header, ROWS))
    assert (images.train.num_units, images.validation.num_units, images.test.num_units) == (2, 1, 1)


def test_columns_are_named_by_settings(manifest, read):
    header = ("where", "what", "who", "role", "site")
    path = manifest(header, ROWS)
    named = {"path_column": "where", "label_column": "what", "patient_column": "WHO", "split_column": "role"}
    assert read(path, **named).train.unit_ids == ("p1", "p2")
    with pytest.raises(DataError, match="path of an image"):
        read(path)
    with pytest.raises(DataError, match="no column mrn") as refusal:
        read(path, **(named | {"patient_column": "mrn"}))
    assert "where, what, who" in str(refusal.value)


def test_without_patient_or_split_every_image_is_its_own_unit_and_trains(manifest, read):
    images = read(manifest(HEADER[:2], [row[:2] for row in ROWS]))
    assert images.unit == "image"
    assert (images.train.num_units, images.test.num_units) == (5, 0)


def test_a_fold_column_of_numbers_is_no_split_unless_named(manifest, read):
    path = manifest(("path", "label", "fold"), [(row[0], row[1], str(i)) for i, row in enumerate(ROWS)])
    assert read(path).train.num_rows == 5
    with pytest.raises(DataError, match="5 unknown-split"):
        read(path, split_column="fold")


def test_a_patient_column_blank_throughout_protects_images(manifest, read):
    path = manifest(("path", "label", "patient"), [(*row[:2], "") for row in ROWS])
    assert read(path).unit == "image"
    with pytest.raises(DataError, match="blank-patient"):
        read(path, patient_column="patient")


def test_every_unusable_row_is_listed_with_its_reason(manifest, read):
    bad = [
        ("", "ill", "p5", "train", ""),
        ("missing.png", "ill", "p5", "train", ""),
        ("f.png", "", "p5", "train", ""),
        ("g.png", "unclear", "p5", "train", ""),
        ("h.png", "ill", " ", "train", ""),
        ("i.png", "ill", "p5", "later", ""),
        ("a.png", "normal", "p9", "train", ""),
        ("missing/j.png", "ill", "p5"),
    ]
    images = read(manifest(HEADER, ROWS + bad), classes=("normal", "ill"), max_skipped_share=0.9)
    assert {s.path: s.reason for s in images.skipped} == {
        "scans.csv line 7": SkipReason.BLANK_PATH,
        "missing.png": SkipReason.MISSING,
        "f.png": SkipReason.BLANK_LABEL,
        "g.png": SkipReason.UNKNOWN_LABEL,
        "h.png": SkipReason.BLANK_PATIENT,
        "i.png": SkipReason.UNKNOWN_SPLIT,
        "a.png": SkipReason.LISTED_TWICE,
        "missing/j.png": SkipReason.MISSING,
    }
    assert images.train.num_rows == 3
    assert images.counts["train"] == {"normal": 1, "ill": 2}


def test_above_the_share_the_hospital_stops_and_says_which(manifest, read):
    rows = [*ROWS, ("missing.png", "ill", "p5", "train", "")]
    path = manifest(HEADER, rows)
    assert len(read(path, max_skipped_share=1 / 6 + 1e-9).skipped) == 1
    with pytest.raises(DataError, match="1 of 6") as refusal:
        read(path, max_skipped_share=1 / 6 - 1e-9)
    assert "missing.png (missing)" in str(refusal.value)
    assert "max-skipped-share" in str(refusal.value)


def test_no_usable_row_is_an_error_whatever_the_share(manifest, read):
    path = manifest(HEADER, [("missing-1.png", "ill", "p1", "train", "")])
    with pytest.raises(DataError, match="not one usable image"):
        read(path, max_skipped_share=1.0)


def test_images_may_lie_elsewhere(manifest, read, tmp_path):
    path = manifest(HEADER, ROWS)
    moved = tmp_path / "table.csv"
    path.rename(moved)
    assert read(moved, path_root=str(tmp_path / "data")).train.num_rows == 3
    assert read(moved, path_root="data").train.num_rows == 3  # from the table's own folder
    with pytest.raises(DataError, match="no folder"):
        read(moved, path_root="nowhere")


def test_absolute_and_windows_paths_inside_the_folder_work(manifest, read, tmp_path):
    path = manifest(HEADER, ROWS)
    text = path.read_text().replace("sub/e.png", r"sub\e.png").replace("a.png", f"{tmp_path}/data/a.png")
    path.write_text(text)
    images = read(path)
    assert images.skipped == ()
    assert images.test.num_rows == 1


def test_a_folder_of_images_with_a_manifest_is_the_manifest(manifest, read):
    rows = [(f"images/{row[0]}", *row[1:]) for row in ROWS]
    folder = manifest(HEADER, rows).parent
    assert read(folder).layout == "CSV manifest (path: path, label: label, patient: patient, split: split)"


def test_columns_can_group_but_never_the_private_ones(manifest):
    records = read_records(DataConfig(path=str(manifest(HEADER, ROWS))), classes=None)
    assert set(records.groups) == {"label", "split", "site"}
    assert records.groups["site"] == ("north", "north", "south", "south", "south")


def test_labels_by_number_mean_the_federations_order(manifest, read):
    rows = [(row[0], "1" if row[1] == "ill" else "0", row[2]) for row in ROWS]
    images = read(manifest(HEADER[:3], rows), classes=("normal", "ill"))
    assert images.counts["train"] == {"normal": 2, "ill": 3}


def test_labels_fit_without_regard_to_case_and_punctuation(manifest, read):
    rows = [(row[0], "No_Finding" if row[1] == "normal" else "ILL", row[2]) for row in ROWS]
    assert read(manifest(HEADER[:3], rows), classes=("no finding", "ill")).counts["train"] == {
        "no finding": 2,
        "ill": 3,
    }


def test_quoted_cells_may_hold_delimiters_and_lines(tmp_path):
    (tmp_path / "t.csv").write_text('path,note\na.png,"one, two\nthree"\nb.png,\n')
    table = read_table(tmp_path / "t.csv")
    assert [row["note"] for row in table.rows] == ["one, two\nthree", ""]
    assert table.lines == (3, 4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"path,label,label\na.png,x,y\n", "two columns named label"),
        (b"just one column\na\n", "header"),
        (b"", "header"),
        ("path,label\nä.png,x\n".encode("latin-1"), "UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "UTF-8"),
        (b'path,label\n"' + b"x" * 200_000, "CSV"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, read, content, said):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read(tmp_path / "t.csv")


def test_a_column_of_measurements_is_no_label(manifest, read):
    path = manifest(("path", "label"), [(row[0], f"{i * 700}") for i, row in enumerate(ROWS)])
    with pytest.raises(DataError, match="label column"):
        read(path).classes  # noqa: B018
