"""Generated data on disk: three layouts, the same images, split by patient; other files are left alone."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.images.dataset import read_hospital_images
from client.images.phantoms import CLASSES
from common.errors import DataError
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing
from simulations.generated_data import NOTICE, SPLITS, write_generated_data

SIZES = {"hospitals": 3, "patients_per_hospital": 24, "image_size": 28, "seed": 4}
LAYOUTS = ("npz", "folders", "csv")
Row = tuple[str, str, str, int, bytes]  # split, patient, site, label, pixels


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("generated")
    return {layout: write_generated_data(root / layout, layout=layout, **SIZES) for layout in LAYOUTS}


def pixels_of(path: Path) -> bytes:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "L"
        assert image.info["Comment"] == NOTICE
        return np.asarray(image).tobytes()


def rows_of_npz(path: Path) -> list[Row]:
    rows: list[Row] = []
    with np.load(path, allow_pickle=False) as archive:
        assert str(archive["notice"]) == NOTICE
        assert tuple(archive["classes"]) == CLASSES
        for split in SPLITS:
            images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
            assert labels.shape == (len(images), 1)
            assert images.dtype == np.uint8
            patients, sites = archive[f"{split}_patients"].tolist(), archive[f"{split}_sites"].tolist()
            for image, label, patient, site in zip(images, labels[:, 0], patients, sites, strict=True):
                rows.append((split, patient, site, int(label), image.tobytes()))
    return rows


def rows_of_folders(folder: Path) -> list[Row]:
    with (folder / "labels.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert {line["path"] for line in table} == on_disk
    assert all(line["path"].split("/")[:2] == [line["split"], line["label"]] for line in table)
    assert {line["notice"] for line in table} == {NOTICE}
    return [
        (x["split"], x["patient_id"], x["site"], CLASSES.index(x["label"]), pixels_of(folder / x["path"]))
        for x in table
    ]


def rows_of_manifest(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["filename", "label", "patient", "split", "site", "notice"]
    assert {line["notice"] for line in table} == {NOTICE}
    folder = path.parent
    assert {line["filename"] for line in table} == {str(p.relative_to(folder)) for p in folder.rglob("*.png")}
    return [
        (x["split"], x["patient"], x["site"], CLASSES.index(x["label"]), pixels_of(folder / x["filename"]))
        for x in table
    ]


@pytest.fixture(scope="module")
def rows(written) -> list[Row]:
    return sorted(rows_of_npz(written["npz"]))


def test_all_layouts_hold_the_same_images(written, rows):
    assert sorted(rows_of_folders(written["folders"])) == rows
    assert sorted(rows_of_manifest(written["csv"])) == rows


def test_a_patient_is_in_one_split_and_every_site_in_each(rows):
    split_of: dict[str, set[str]] = {}
    for split, patient, _, _, _ in rows:
        split_of.setdefault(patient, set()).add(split)
    assert len(split_of) == SIZES["hospitals"] * SIZES["patients_per_hospital"]
    assert all(len(splits) == 1 for splits in split_of.values())
    sites = {site for _, _, site, _, _ in rows}
    assert sites == {"phantom-hospital-1", "phantom-hospital-2", "phantom-hospital-3"}
    for site in sites:
        patients = {split: {(r[1], r[3]) for r in rows if r[0] == split and r[2] == site} for split in SPLITS}
        assert {split: len(group) for split, group in patients.items()} == {"train": 16, "val": 2, "test": 6}
        ill = {split: sum(label for _, label in group) for split, group in patients.items()}
        assert ill == {"train": 8, "val": 1, "test": 3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hospital_reads_every_layout(written, rows, layout):
    """The hospital's own reader recognises the layout and finds patients, classes and splits by itself."""
    images = read_hospital_images(
        DataConfig(path=str(written[layout])),
        preprocessing=Preprocessing(image_size=28, channels=1),
        classes=None,
        cache_folder=None,
    )
    assert images.classes == CLASSES
    assert images.unit == "patient"
    assert not images.skipped
    for name, part in zip(SPLITS, (images.train, images.validation, images.test), strict=True):
        expected = sorted((r[1], r[3], r[4]) for r in rows if r[0] == name)
        patients = [part.unit_ids[unit] for unit in part.units]
        pixels = [image.tobytes() for image in part.inputs["image"]]
        assert sorted(zip(patients, part.targets.tolist(), pixels, strict=True)) == expected


def test_writing_twice_gives_the_same_files(written, tmp_path):
    for layout in LAYOUTS:
        again = write_generated_data(tmp_path / layout, layout=layout, **SIZES)
        folders = [path if path.is_dir() else path.parent for path in (written[layout], again)]
        first, second = (
            {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
            for root in folders
        )
        assert first.keys() == second.keys()
        if layout == "npz":  # a zip file also holds the time of writing
            assert sorted(rows_of_npz(written[layout])) == sorted(rows_of_npz(again))
            first.pop("phantoms.npz"), second.pop("phantoms.npz")
        assert first == second


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_folder_says_that_the_images_are_generated(written, layout):
    folder = written[layout] if layout == "folders" else written[layout].parent
    readme = (folder / "README.txt").read_text()
    assert readme.startswith(NOTICE)
    assert "28 x 28 px" in readme
    assert "72 invented" in readme
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_other_files_are_never_replaced(tmp_path):
    mine = tmp_path / "films"
    mine.mkdir()
    (mine / "real.png").write_bytes(b"a film")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="films"):
            write_generated_data(mine, layout="csv", overwrite=overwrite, **SIZES)
    (mine / "README.txt").write_text(NOTICE)  # even beside generated ones
    with pytest.raises(DataError, match="other files"):
        write_generated_data(mine, layout="csv", overwrite=True, **SIZES)
    assert sorted(path.name for path in mine.iterdir()) == ["README.txt", "real.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="not a folder"):
        write_generated_data(tmp_path / "file", layout="csv", **SIZES)


def test_overwriting_replaces_the_earlier_layout(tmp_path):
    folder = tmp_path / "phantoms"
    folder.mkdir()  # an empty folder is free
    write_generated_data(folder, layout="folders", **SIZES)
    with pytest.raises(DataError, match="not empty"):
        write_generated_data(folder, layout="npz", **SIZES)
    write_generated_data(folder, layout="npz", overwrite=True, **SIZES)
    assert sorted(path.name for path in folder.iterdir()) == ["README.txt", "phantoms.npz"]


def test_a_failed_write_leaves_the_earlier_data_whole(tmp_path, monkeypatch):
    folder = tmp_path / "phantoms"
    data = write_generated_data(folder, layout="csv", **SIZES)
    before = sorted(rows_of_manifest(data))

    def disk_full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_generated_data(folder, layout="folders", overwrite=True, **SIZES | {"seed": 5})
    assert sorted(rows_of_manifest(data)) == before
    assert sorted(path.name for path in folder.iterdir()) == ["README.txt", "images", "metadata.csv"]


def test_shares_of_zero_leave_a_split_empty(tmp_path):
    rows = rows_of_manifest(write_generated_data(tmp_path / "x", layout="csv", val_share=0, **SIZES))
    assert {row[0] for row in rows} == {"train", "test"}
    empty = write_generated_data(tmp_path / "y", layout="npz", val_share=0, **SIZES)
    assert sorted(rows_of_npz(empty)) == sorted(rows)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layout": "dicom"},
        {"hospitals": 0},
        {"patients_per_hospital": 2},
        {"test_share": 1.0},
        {"test_share": 0.6, "val_share": 0.4},
        {"val_share": -0.1},
        {"image_size": 5},
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"got|too few"):
        write_generated_data(tmp_path / "x", **{"layout": "npz"} | SIZES | wrong)
    assert not (tmp_path / "x").exists()
