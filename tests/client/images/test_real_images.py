"""The real data sets, against the counts that their publishers state."""

import csv
import time
from collections import Counter

import numpy as np

from client.images.dataset import read_records
from client.images.decoded import decode_records
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing


def test_pneumoniamnist(shared_data, read):
    path = shared_data / "pneumoniamnist" / "pneumoniamnist.npz"
    records = read_records(DataConfig(path=str(path)), classes=None)
    assert Counter(records.splits) == {"train": 4708, "validation": 524, "test": 624}
    assert Counter(zip(records.splits, records.labels, strict=True)) == {
        ("train", "0"): 1214, ("train", "1"): 3494, ("validation", "0"): 135,
        ("validation", "1"): 389, ("test", "0"): 234, ("test", "1"): 390,
    }  # fmt: skip
    start = time.perf_counter()
    images = read(path, classes=("normal", "pneumonia"), size=28)
    assert time.perf_counter() - start < 3  # about 0.15 s on an idle core; a loaded one must not fail
    # 8 pictures stand in train (10 rows) and in validation: with all their copies they only validate.
    assert images.units_in_several_splits == 8
    assert (images.train.num_rows, images.validation.num_rows, images.test.num_rows) == (4698, 534, 624)
    with np.load(path) as archive:
        assert np.array_equal(images.test.inputs["image"].sum(), archive["test_images"].sum())


def test_kermany(shared_data, read, tmp_path):
    folder = shared_data / "kermany_cxr"
    first = read(folder, size=64, cache=tmp_path / "cache")
    start = time.perf_counter()
    images = read(folder, size=64, cache=tmp_path / "cache")
    assert time.perf_counter() - start < 5  # about 0.3 s on idle cores
    assert images.counts["train"] == {"NORMAL": 700, "PNEUMONIA": 1200}
    assert images.counts["test"] == {"NORMAL": 200, "PNEUMONIA": 255}
    assert images.unit == "patient"
    assert images.train.num_units + images.test.num_units == 1648
    assert images.skipped == ()
    assert isinstance(images.train.inputs["image"], np.memmap)
    assert np.array_equal(images.train.inputs["image"], first.train.inputs["image"])
    with (folder / "labels.csv").open() as file:
        rows = Counter(row["patient_id"] for row in csv.DictReader(file))
    sizes = np.bincount(images.train.units)
    assert {unit: int(size) for unit, size in zip(images.train.unit_ids, sizes, strict=True)} == {
        unit: size for unit, size in rows.items() if not unit.startswith("test-")
    }


def test_covid_by_site(shared_data):
    folder = shared_data / "covid_cxr_sites"
    data = DataConfig(
        path=str(folder / "metadata.csv"),
        path_column="filename",
        path_root=str(folder / "images"),
        label_column="finding_group",
        patient_column="patientid",
    )
    decoded = decode_records(
        read_records(data, classes=None),
        preprocessing=Preprocessing(image_size=28, channels=1),
        cache_folder=None,
        max_pixels=data.max_pixels,
        max_skipped_share=0,
    )
    assert decoded.examples.num_rows == 205
    assert decoded.examples.num_units == 106
    assert decoded.classes == ("no_finding", "covid", "other_pneumonia")
    assert Counter(decoded.unit_groups("site")) == {
        "hannover": 33, "spain_portugal": 15, "asia_africa": 16, "uk_ireland": 10,
        "italy": 14, "americas": 7, "europe_other": 8, "unknown": 3,
    }  # fmt: skip


def test_mednist_has_six_classes(shared_data):
    records = read_records(DataConfig(path=str(shared_data / "mednist")), classes=None)
    assert len(records) == 2400
    assert set(Counter(records.labels).values()) == {400}
    assert len(records.classes) == 6
