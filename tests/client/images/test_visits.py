"""A patient's images in order of time: which are seen, in which order, with which label, in whose unit."""

import datetime

import numpy as np
import pytest

from client.doctor.checkup import check_images
from client.images.dataset import read_hospital_images
from client.images.parts import write_part
from client.images.records import SkipReason
from client.images.times import Moment, moments
from common.errors import DataError
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing
from common.series_form import SINGLE_IMAGES, SeriesForm
from tests.client.images.conftest import SIZE

HEADER = ("path", "patient", "day", "label")
VISITS = SeriesForm(kind="visits", steps=3)
NEXT = SeriesForm(kind="visits", steps=3, next_finding=True)
ROWS = [  # anna's four visits are listed in no order, bo and cy have one and two
    ("a1.png", "anna", "0", "well"),
    ("b1.png", "bo", "7", "ill"),
    ("a4.png", "anna", "900", "ill"),
    ("a2.png", "anna", "100", "well"),
    ("c1.png", "cy", "-3", "well"),
    ("a3.png", "anna", "365.25", "ill"),
    ("c2.png", "cy", "40", "well"),
]
NUMBER = {row[0]: number for number, row in enumerate(ROWS)}


def read(path, form, **settings):
    return read_hospital_images(
        DataConfig(path=str(path), **settings),
        preprocessing=Preprocessing(image_size=SIZE, channels=1),
        classes=settings.pop("classes", None),
        cache_folder=None,
        form=form,
    )


def by_patient(images):
    train = images.train
    return {
        train.unit_ids[train.units[row]]: (
            [p[0] for p in train.inputs["image"][row]],
            train.inputs["present"][row].tolist(),
            train.inputs["years"][row].tolist(),
            images.classes[train.targets[row]],
        )
        for row in range(train.num_rows)
    }


def test_visits_are_in_order_of_time_the_latest_are_kept_and_the_last_label_counts(manifest, pixels):
    images = read(manifest(HEADER, ROWS), VISITS)
    found = by_patient(images)
    assert images.train.num_units == images.train.num_rows == 3
    assert images.unit == "patient"
    seen, present, years, label = found["anna"]
    for picture, name in zip(seen, ("a2.png", "a3.png", "a4.png"), strict=True):
        assert np.array_equal(picture, pixels(NUMBER[name]))
    assert present == [1, 1, 1]
    assert label == "ill"
    assert years == pytest.approx([0, 265.25 / 365.25, 534.75 / 365.25])
    assert found["bo"][1] == [1, 0, 0]
    assert found["bo"][3] == "ill"
    assert not np.any(found["bo"][0][1:])
    assert found["cy"][2] == pytest.approx([0, 43 / 365.25, 0])
    assert images.series_lengths["train"] == {1: 1, 2: 1, 3: 1}


def test_progression_asks_for_the_label_of_the_visit_that_is_not_seen(manifest, pixels):
    images = read(manifest(HEADER, ROWS), NEXT)
    found = by_patient(images)
    assert set(found) == {"anna", "cy"}  # bo came once: nothing to foretell
    assert [entry.path for entry in images.skipped] == ["b1.png"]
    assert images.skipped[0].reason is SkipReason.SINGLE_VISIT
    seen, present, _, label = found["anna"]
    for picture, name in zip(seen, ("a1.png", "a2.png", "a3.png"), strict=True):
        assert np.array_equal(picture, pixels(NUMBER[name]))
    assert label == "ill"
    assert present == [1, 1, 1]
    assert found["cy"][1] == [1, 0, 0]
    assert found["cy"][3] == "well"


def test_a_second_image_of_the_day_to_be_foretold_is_not_seen(manifest, pixels):
    rows = [*ROWS[:3], ("a5.png", "anna", "900", "well")]
    found = by_patient(read(manifest(HEADER, rows), NEXT))
    assert found["anna"][1] == [1, 0, 0]
    assert np.array_equal(found["anna"][0][0], pixels(0))


def test_broken_and_undated_visits_are_missing_from_their_series(manifest):
    rows = [*ROWS, ("c3.png", "cy", "soon", "well"), ("missing.png", "anna", "1", "ill")]
    path = manifest(HEADER, rows)
    (path.parent / "a3.png").write_bytes(b"no picture")
    images = read(path, VISITS, max_skipped_share=0.5, time_column="day")
    reasons = {entry.path: entry.reason for entry in images.skipped}
    assert reasons["c3.png"] is SkipReason.UNKNOWN_TIME
    assert reasons["missing.png"] is SkipReason.MISSING
    assert reasons["a3.png"] is SkipReason.UNREADABLE
    found = by_patient(images)
    assert found["anna"][1] == [1, 1, 1]
    assert found["cy"][1] == [1, 1, 0]
    assert found["anna"][2] == pytest.approx([0, 100 / 365.25, 800 / 365.25])


def test_a_patient_in_two_splits_has_one_series_on_the_strict_side(manifest):
    rows = [(*row, "test" if row[0] == "a1.png" else "train") for row in ROWS]
    images = read(manifest((*HEADER, "split"), rows), VISITS)
    assert set(images.test.unit_ids) == {"anna"}
    assert set(images.train.unit_ids) == {"bo", "cy"}
    assert images.units_in_several_splits == 1
    assert images.test.num_rows == 1


def test_without_patients_or_times_there_are_no_visits(manifest, tmp_path):
    nobody = manifest(("path", "day", "label"), [(r[0], r[2], r[3]) for r in ROWS])
    with pytest.raises(DataError, match="whose image is whose"):
        read(nobody, VISITS)
    never = manifest(("path", "patient", "label"), [(r[0], r[1], r[3]) for r in ROWS])
    with pytest.raises(DataError, match="time-column"):
        read(never, VISITS)
    with pytest.raises(DataError, match="no column when"):
        read(never, VISITS, time_column="when")
    once = manifest(HEADER, ROWS[:2])
    with pytest.raises(DataError, match="two visits"):
        read(once, NEXT)


def test_a_part_gives_back_the_series_that_were_written(manifest, tmp_path):
    images = read(manifest(HEADER, ROWS), VISITS)
    part = tmp_path / "part.npz"
    write_part(part, train=images.train, validation=images.train.select_units([]), classes=("ill", "well"),
               unit="patient")  # fmt: skip
    back = read(part, VISITS)
    for name, values in images.train.inputs.items():
        assert np.array_equal(back.train.inputs[name], values), name
    assert np.array_equal(back.train.targets, images.train.targets)
    assert b"anna" not in part.read_bytes()
    for other in (SINGLE_IMAGES, SeriesForm(kind="visits", steps=4)):
        with pytest.raises(DataError, match="another run"):
            read(part, other)


def test_the_check_says_how_many_series_have_how_many_steps(manifest):
    checkup = check_images(
        DataConfig(path=str(manifest(HEADER, ROWS))),
        preprocessing=Preprocessing(image_size=SIZE, channels=1),
        classes=None,
        cache_folder=None,
        form=VISITS,
    )
    rows = {check: result for check, result, _ in checkup.rows()}
    assert rows["train series"].startswith("3 of 3 patients")
    assert checkup.is_usable
    assert rows["train series' steps"] == "1 of 1, 1 of 2, 1 of 3"


@pytest.mark.parametrize(
    "text",
    ["2024-02-29", "20240229", "2024/02/29", "29.02.2024", "February 29, 2024", "29 Feb 2024"],
)
def test_dates_as_people_write_them(text):
    (found,) = moments("StudyDate", [text])
    assert found is not None
    assert found.place == (datetime.date(2024, 2, 29) - datetime.date(1900, 1, 1)).days
    assert not found.is_order


def test_numbers_are_days_orders_or_years_by_their_column():
    assert moments("offset", ["-3", "", "2.5"]) == [Moment(-3.0), None, Moment(2.5)]
    assert moments("visit", ["1", "2"]) == [Moment(1.0, is_order=True), Moment(2.0, is_order=True)]
    assert moments("date", ["2017"])[0].place == (datetime.date(2017, 1, 1) - datetime.date(1900, 1, 1)).days
    assert moments("date", ["03/09/20"]) == [None]  # March or September?
    assert moments("offset", ["nan", "1e300"]) == [None, None]
    assert Moment(2, is_order=True).years_since(Moment(1, is_order=True)) == 0
