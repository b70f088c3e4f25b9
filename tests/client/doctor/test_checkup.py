import json

import pytest

from client.doctor.checkup import check_images
from client.images.cache import FOLDER
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing


@pytest.fixture
def check():
    def checker(path, *, classes=("normal", "ill"), cache=None, **settings):
        return check_images(
            DataConfig(path=str(path), **settings),
            preprocessing=Preprocessing(image_size=12, channels=1),
            classes=classes,
            cache_folder=cache,
        )

    return checker


def scans(count):
    return [(f"{n}.png", ("ill", "normal")[n % 2], f"p{n // 2}", "train") for n in range(count)]


HEADER = ("path", "label", "patient", "split")


def test_sound_data_need_nothing(manifest, check, tmp_path):
    checkup = check(manifest(HEADER, scans(120)), cache=tmp_path / "cache")
    assert checkup.is_usable
    assert checkup.images["train"] == {"normal": 60, "ill": 60}
    assert checkup.units == {"train": 60, "validation": 0, "test": 0}
    assert checkup.unit == "patient"
    rows = {row[0]: row[1:] for row in checkup.rows()}
    assert rows["train images"] == ("120 of 60 patients (normal 60, ill 60)", "")
    assert rows["cache"] == (str(tmp_path / "cache" / FOLDER), "")
    # Noise may look like a negative; films do not (test_findings.py).
    assert {name for name, (_, advice) in rows.items() if advice} <= {"inverted"}


def test_every_trouble_is_counted_and_has_a_remedy(manifest, check, draw):
    rows = [
        *scans(6),
        ("missing-1.png", "ill", "p8", "train"),
        ("missing-2.png", "ill", "p8", "train"),
        ("x.png", "unclear", "p8", "train"),
        ("../x.png", "ill", "p8", "train"),
        ("y.png", "ill", "p0", "test"),
        ("twin.png", "ill", "p9", "train"),
    ]
    path = manifest(HEADER, rows)
    draw(path.parent / "twin.png", 5)
    checkup = check(path)
    assert not checkup.is_usable
    assert checkup.skipped_share == pytest.approx(4 / 12)
    said = {row[0]: row[1:] for row in checkup.rows()}
    assert said["skipped: missing"][0] == "2: missing-1.png, missing-2.png"
    assert said["skipped: unknown-label"][0] == "1: x.png"
    assert said["skipped: escaping"][0] == "1: ../x.png"
    assert said["skipped in all"][0] == "33.3% of the images (at most 5.0%)"
    assert said["patients in several splits"][0].startswith("1:")
    assert said["repeated pictures"][0] == "1"
    for name in (
        "skipped: missing",
        "skipped in all",
        "patients in several splits",
        "repeated pictures",
        "size",
    ):
        assert said[name][1]
    json.dumps(checkup.rows())


def test_images_without_patients_are_said_to_be_so(tmp_path, draw, check):
    for number in range(4):
        draw(tmp_path / "data" / "ill" / f"{number}.png", number)
    said = {row[0]: row[1:] for row in check(tmp_path / "data").rows()}
    assert said["unit of protection"][0] == "image: no patient ids found"
    assert said["unit of protection"][1]
    assert said["train images"] == (
        "4 (normal 0, ill 4)",
        "no image of normal: correct if the hospital has none",
    )


def test_data_that_cannot_be_used_are_a_result(tmp_path, check):
    checkup = check(tmp_path / "nowhere")
    assert not checkup.is_usable
    [(name, result, advice)] = checkup.rows()
    assert name == "images"
    assert "nowhere" in result
    assert advice
