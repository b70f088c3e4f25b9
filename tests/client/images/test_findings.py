"""Labels of several findings and of ordered levels, in every form that a hospital may have them."""

import numpy as np
import pytest

from client.images.dataset import read_records
from client.images.decoded import targets_of
from client.images.labels import with_classes
from client.images.records import SkipReason
from common.errors import DataError
from common.hospital_config import DataConfig

FINDINGS = ("Edema", "Effusion", "Mass")


def records_of(path, *, classes=FINDINGS, task="multi-label", **settings):
    return read_records(DataConfig(path=str(path), **settings), classes=classes, task=task)


def labelled(labels):
    return [(f"{number}.png", label) for number, label in enumerate(labels)]


def reasons(records):
    return [entry.reason for entry in records.skipped]


@pytest.mark.parametrize("sign", ["|", ";", ",", " | "])
def test_findings_of_one_column(manifest, sign):
    labels = [f"Mass{sign}edema", "Effusion", "No Finding", "normal", "0|2"]
    records = records_of(manifest(("path", "label"), labelled(labels), delimiter="\t"))
    targets = targets_of(records.labels, records)
    assert targets.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 1]]
    assert targets.dtype == np.int64


def test_an_image_with_an_unknown_finding_is_left_out_with_the_reason(manifest):
    labels = ["Mass|Edemma", "", "Edema", "unclear"]
    records = records_of(manifest(("path", "label"), labelled(labels)))
    assert records.labels == ("Edema",)
    assert sorted(reasons(records)) == sorted(
        [SkipReason.UNKNOWN_LABEL, SkipReason.BLANK_LABEL, SkipReason.UNKNOWN_LABEL]
    )


def test_findings_of_data_that_nobody_described(manifest):
    records = records_of(manifest(("path", "label"), labelled(["b|a", "No Finding", "c"])), classes=None)
    assert records.classes == ("a", "b", "c")
    assert targets_of(records.labels, records).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_one_column_of_yes_and_no_for_each_finding(manifest):
    rows = [
        ("a.png", "Y", "0"),
        ("b.png", "n", "1"),
        ("c.png", "no", "False"),
        ("d.png", "", "1"),
        ("e.png", "?", "1"),
    ]
    path = manifest(("path", "icu", "dead"), rows)
    records = records_of(path, classes=None, label_column="icu, dead")
    assert records.classes == ("dead", "icu")
    assert targets_of(records.labels, records).tolist() == [[0, 1], [1, 0], [0, 0]]
    assert sorted(reasons(records)) == sorted([SkipReason.BLANK_LABEL, SkipReason.UNKNOWN_LABEL])
    with pytest.raises(DataError, match="several labels for one image are no classification"):
        records_of(path, classes=None, task="classification", label_column="icu,dead")
    with pytest.raises(DataError, match="no column ward"):
        records_of(path, label_column="icu,ward")


def test_steps_of_a_ladder_end_at_the_first_no(manifest):
    rows = [
        ("a.png", "N", ""),
        ("b.png", "Y", "N"),
        ("c.png", "Y", "Y"),
        ("d.png", "Y", ""),
        ("e.png", "?", "Y"),
    ]
    path = manifest(("path", "icu", "tube"), rows)
    levels = ("ward", "intensive", "ventilated")
    records = records_of(path, classes=levels, task="ordinal", label_column="icu>tube")
    assert records.labels == levels
    assert targets_of(records.labels, records).tolist() == [0, 1, 2]
    assert sorted(reasons(records)) == sorted([SkipReason.BLANK_LABEL, SkipReason.UNKNOWN_LABEL])


def test_a_number_between_two_levels_goes_to_the_nearest(manifest):
    path = manifest(("path", "label"), labelled(["0", "1.4", "1.5", "3.0", "7.2"]))
    records = records_of(path, classes=("0", "1", "2", "3"), task="ordinal")
    assert records.labels == ("0", "1", "2", "3")
    assert reasons(records) == [SkipReason.UNKNOWN_LABEL]
    assert records_of(path, classes=None, task="ordinal").classes == tuple(map(str, range(8)))


def test_levels_that_are_words_need_an_order(manifest):
    path = manifest(("path", "label"), labelled(["mild", "severe", "none"]))
    with pytest.raises(DataError, match="the levels have no order"):
        records_of(path, classes=None, task="ordinal")
    records = records_of(path, classes=("none", "mild", "severe"), task="ordinal")
    assert targets_of(records.labels, records).tolist() == [1, 2, 0]


def test_no_label_among_the_findings_is_an_error_in_words(manifest):
    path = manifest(("path", "label"), labelled(["x|y", "z"]))
    with pytest.raises(DataError, match="no image has labels that are all among") as refusal:
        records_of(path)
    assert "Edema" in str(refusal.value)


@pytest.mark.parametrize("named", [False, True])
def test_an_npz_with_a_column_for_each_finding(tmp_path, named):
    images, labels = np.zeros((3, 8, 8), np.uint8), np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    more = {"classes": np.array(FINDINGS)} if named else {}
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, **more)
    records = records_of(tmp_path / "a.npz")
    assert targets_of(records.labels, records).tolist() == labels.tolist()
    assert with_classes(records_of(tmp_path / "a.npz", classes=None), None, task="multi-label").classes
    with pytest.raises(DataError, match="several labels for one image"):
        records_of(tmp_path / "a.npz", task="classification")
