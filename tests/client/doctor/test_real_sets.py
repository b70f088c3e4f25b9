"""On real public sets: the rates that docs/data-doctor.md states, and copies that their makers overlooked."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from client.doctor.near_duplicates import near_duplicates
from common.checks import CheckState
from tests.client.doctor.films import by_name, checkup


@pytest.fixture(scope="module")
def films(shared_data):
    """The 205 COVID films and whose each is."""
    folder = shared_data / "covid_cxr_sites"
    with (folder / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    opened = [Image.open(folder / "images" / row["filename"]).convert("L") for row in rows]
    return opened, [row["patientid"] for row in rows]


def small(films):
    return np.stack([np.asarray(film.resize((64, 64), Image.Resampling.BILINEAR)) for film in films])[:, None]


def coded_again(film):
    stream = io.BytesIO()
    film.resize((film.width // 2, film.height // 2)).save(stream, "JPEG", quality=50)
    return Image.open(stream)


def test_real_films_are_told_apart_and_every_copy_of_them_is_found(films):
    pictures, patients = films
    originals = small(pictures)
    groups = near_duplicates(originals, np.arange(205))
    # The same films from two places on the web, under two patient ids; looked at by eye.
    assert [len(group) for group in groups] == [2, 2, 2, 2]
    assert all(len({patients[row] for row in group}) == 2 for group in groups)
    again = near_duplicates(np.concatenate([originals, small(map(coded_again, pictures))]), np.arange(410))
    home = {row: group[0] for group in again for row in group}
    assert all(home[row] == home[row + 205] for row in range(205))
    assert sum(map(len, again)) == 410
    assert len(again) == 201


def test_copies_under_two_patients_in_the_covid_set_are_named(shared_data):
    table = shared_data / "covid_cxr_sites" / "metadata.csv"
    columns = {"path_column": "filename", "path_root": "images", "patient_column": "patientid"}
    said = by_name(checkup(table, classes=None, label_column="finding_group", **columns))
    leaks = said["near-duplicates across patients"]
    assert leaks.severity is CheckState.WARNING
    assert len(leaks.files) == 4
    assert any("16660_2_1.jpg" in group for group in leaks.files)
    assert said["inverted"].files == (("262a70ca.jpg",),)  # a false alarm
    assert said["blank pictures"].severity is CheckState.OK
    assert said["names of files"].severity is CheckState.OK
    assert said["identifiers in the table"].severity is CheckState.OK


def test_the_head_ct_raises_little(shared_data, tmp_path):
    files = sorted((shared_data / "ct_head_series").glob("*.dcm"))
    for number in (1, 2):  # without a slice at either end, then whole
        kept = files[:-2] if number == 1 else files
        folder = tmp_path / f"series-{number}"
        folder.mkdir()
        for file in kept:
            (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "scans.csv").write_text("path,label,patient\nseries-1,ill,a\nseries-2,well,b\n")
    said = by_name(checkup(tmp_path / "scans.csv", classes=None))
    assert said["pixel spacing"].severity is CheckState.OK
    assert said["identifiers in headers"].severity is CheckState.NOTE  # marked as de-identified
    assert said["ends of series"].severity is CheckState.NOTE or "none says" in said["ends of series"].result
