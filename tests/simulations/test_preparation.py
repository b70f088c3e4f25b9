from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client.images.dataset import read_hospital_images
from common.errors import ConfigError, DataError
from common.hospital_config import HospitalConfig
from common.preprocessing import Preprocessing
from common.settings import load
from simulations.generated_data import write_generated_data
from simulations.held_back import draw_stratified, read_held_back
from simulations.preparation import Prepared, enrolled, prepare, relocate, roster
from simulations.reading import channels_of, read_images
from simulations.scenario import make_scenario

PLANTED = "planted-canary"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_films(root: Path, rows: list[tuple[str, str, str, str]], *, header: str) -> Path:
    """A CSV manifest with one small grey picture per row; the first column names the file."""
    random = np.random.default_rng(3)
    (root / "pictures").mkdir(parents=True)
    lines = [header]
    for name, *rest in rows:
        Image.fromarray(random.integers(0, 256, (20, 20), dtype=np.uint8)).save(root / "pictures" / name)
        lines.append(",".join([f"pictures/{name}", *rest]))
    (root / "films.csv").write_text("\n".join(lines) + "\n")
    return root / "films.csv"


def planted_rows(patients: int, site_of=lambda patient: f"s{patient % 2}") -> list[tuple[str, str, str, str]]:
    return [
        (f"{PLANTED}-{p}-{i}.png", ["ill", "normal"][p % 2], f"{PLANTED}-patient-{p}", site_of(p))
        for p in range(patients)
        for i in range(1 + p % 2)
    ]


def hospital_images(prepared: Prepared, name: str):
    config = load(HospitalConfig, prepared.folder / "hospitals" / name / "hospital.toml")
    data = prepared.config.data
    return config, read_hospital_images(
        config.data,
        preprocessing=Preprocessing(image_size=data.image_size, channels=data.channels),
        classes=data.classes,
        cache_folder=None,
    )


def test_the_run_folder_holds_every_patient_once_and_names_nobody(tmp_path: Path) -> None:
    table = write_films(tmp_path / "data", planted_rows(60), header="path,label,patient,site")
    prepared = prepare(
        make_scenario({"data": str(table), "hospitals": 3, "image_size": 28, "out": str(tmp_path / "run")})
    )
    names = [hospital.name for hospital in prepared.hospitals]
    assert names == roster(prepared.folder) == ["hospital-1", "hospital-2", "hospital-3"]
    train_rows = 0
    for hospital in prepared.hospitals:
        config, images = hospital_images(prepared, hospital.name)
        assert images.train.num_units == hospital.patients
        assert config.hospital.enrolled_patients == enrolled(hospital.patients)
        assert images.train.num_rows == hospital.images
        assert images.unit == "patient"
        assert config.policy.epsilon == 8
        assert not config.policy.allow_non_private
        train_rows += images.train.num_rows
    test = prepared.held_back.sets["test"]
    assert train_rows + len(test.targets) == 90
    assert sum(hospital.patients for hospital in prepared.hospitals) + len(np.unique(test.units)) == 60
    for path in prepared.folder.rglob("*"):
        assert PLANTED not in str(path)
        assert not path.is_file() or PLANTED.encode() not in path.read_bytes(), path


def test_the_same_seed_prepares_the_same_hospitals(tmp_path: Path) -> None:
    table = write_films(tmp_path / "data", planted_rows(40), header="path,label,patient,site")
    pixels = {}
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = {
            "data": str(table),
            "hospitals": 2,
            "image_size": 28,
            "seed": seed,
            "out": str(tmp_path / out),
        }
        prepared = prepare(make_scenario(flags))
        pixels[out] = hospital_images(prepared, "hospital-1")[1].train.inputs["image"].tobytes()
    assert pixels["a"] == pixels["b"]
    assert pixels["a"] != pixels["c"]


def test_sites_become_hospitals_with_their_own_test_patients(tmp_path: Path) -> None:
    def site_of(patient: int) -> str:
        return "tiny site" if patient < 3 else f"site-{patient % 2}"

    table = write_films(tmp_path / "data", planted_rows(60, site_of), header="path,label,patient,site")
    prepared = prepare(
        make_scenario(
            {"data": str(table), "partition": "column:site", "image_size": 28, "out": str(tmp_path / "run")}
        )
    )
    assert [hospital.name for hospital in prepared.hospitals] == ["site-0", "site-1"]
    assert [entry.name for entry in prepared.left_out] == ["tiny site"]
    # Sites alternate like labels here: each hospital has one class only, and so have its test patients.
    test = read_held_back(prepared.folder / "held-back.npz").sets["test"]
    for position, name in enumerate(["site-0", "site-1"]):
        _, images = hospital_images(prepared, name)
        assert len(np.unique(images.train.targets)) == 1
        assert set(test.targets[test.hospitals == position]) == set(images.train.targets)


def test_named_splits_are_kept_and_validation_is_held_by_the_simulation(tmp_path: Path) -> None:
    data = write_generated_data(
        tmp_path / "data", layout="npz", hospitals=2, patients_per_hospital=40, image_size=28, seed=0
    )
    prepared = prepare(make_scenario({"data": str(data), "out": str(tmp_path / "run")}))
    with np.load(data, allow_pickle=False) as archive:
        expected = {"test": len(archive["test_labels"]), "validation": len(archive["val_labels"])}
    assert {name: len(scored.targets) for name, scored in prepared.held_back.sets.items()} == expected
    assert prepared.held_back.is_named
    assert prepared.config.data.image_size == 28


def test_sub_folders_become_hospitals(tmp_path: Path) -> None:
    for site in ("north", "south"):
        write_generated_data(
            tmp_path / "data" / site,
            layout="folders",
            hospitals=1,
            patients_per_hospital=30,
            image_size=32,
            seed=1,
        )
    prepared = prepare(
        make_scenario(
            {
                "data": str(tmp_path / "data"),
                "partition": "folders",
                "image_size": 28,
                "out": str(tmp_path / "r"),
            }
        )
    )
    assert [hospital.name for hospital in prepared.hospitals] == ["north", "south"]
    # The generated patients have the same ids in both, and are still two people.
    assert [hospital.patients for hospital in prepared.hospitals] == [19, 19]


def test_colour_that_is_grey_counts_as_grey(tmp_path: Path) -> None:
    for colour, expected in (((120, 120, 121), 1), ((200, 40, 90), 3)):
        root = tmp_path / str(expected)
        for label in ("a", "b"):
            (root / label).mkdir(parents=True)
            for number in range(4):
                image = np.zeros((16, 16, 3), np.uint8) + np.array(colour, np.uint8)
                image[: number + 1] = 10 * number + (label == "b")
                Image.fromarray(image).save(root / label / f"{number}.png")
        images = read_images(make_scenario({"data": str(root)}))
        assert images.preprocessing.channels == expected
        assert images.preprocessing.image_size == 64
        assert images.decoded.unit == "image"


def test_a_moved_run_folder_finds_its_images_again(tmp_path: Path) -> None:
    prepared = prepare(make_scenario({"hospitals": 2, "out": str(tmp_path / "run")}))
    moved = tmp_path / "moved"
    prepared.folder.rename(moved)
    relocate(moved)
    for name in roster(moved):
        path = load(HospitalConfig, moved / "hospitals" / name / "hospital.toml").data.path
        assert Path(path).is_relative_to(moved)
        assert Path(path).is_file()


@given(st.integers(1, 10**7))
def test_the_public_count_is_rounded_up_to_tens_and_two_digits(patients: int) -> None:
    public = enrolled(patients)
    assert patients <= public < max(patients + 10, patients * 1.1 + 1)
    assert public % 10 == 0
    assert len(str(public).rstrip("0")) <= 2


def test_strata_keep_their_share_and_small_ones_are_not_always_spared() -> None:
    strata = ["a"] * 100 + ["b"] * 20 + ["c"]
    drawn = draw_stratified(strata, share=0.25, seed=0)
    assert drawn[:100].sum() == 25
    assert drawn[100:120].sum() == 5
    assert {bool(draw_stratified(strata, share=0.25, seed=seed)[120]) for seed in range(30)} == {True, False}


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ({"data": "missing.npz"}, DataError),
        ({"partition": "column:hair"}, ConfigError),
        ({"hospitals": 2, "image_size": 16}, ConfigError),
        ({"data": ".", "partition": "folders"}, (ConfigError, DataError)),
    ],
)
def test_impossible_data_leave_no_run_folder(tmp_path: Path, flags: dict, error) -> None:
    with pytest.raises(error):
        prepare(make_scenario({**flags, "out": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        prepare(make_scenario({"out": str(tmp_path)}))


def test_real_sites_of_which_one_is_too_small(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "covid_cxr_sites"
    prepared = prepare(
        make_scenario(
            {
                "data": str(folder / "metadata.csv"),
                "label_column": "finding_group",
                "path_column": "filename",
                "path_root": str(folder / "images"),
                "patient_column": "patientid",
                "partition": "column:site",
                "image_size": 28,
                "out": str(tmp_path / "run"),
            }
        )
    )
    assert len(prepared.hospitals) >= 5
    assert prepared.config.data.channels == 1
    assert [entry.name for entry in prepared.left_out] == ["unknown"]
    assert sum(hospital.patients for hospital in prepared.hospitals) < 106


def test_grey_arrays_need_no_look(shared_data: Path) -> None:
    from client.images.dataset import read_records
    from common.hospital_config import DataConfig

    path = shared_data / "pneumoniamnist" / "pneumoniamnist.npz"
    assert channels_of(read_records(DataConfig(path=str(path)), classes=None)) == 1


def test_named_validation_patients_are_dealt_out_to_the_hospitals(tmp_path: Path) -> None:
    data = write_generated_data(
        tmp_path / "data", layout="npz", hospitals=2, patients_per_hospital=60, image_size=28, seed=0
    )
    prepared = prepare(make_scenario({"data": str(data), "hospitals": 3, "out": str(tmp_path / "run")}))
    held = prepared.held_back.sets["validation"]
    parts = [hospital_images(prepared, hospital.name)[1] for hospital in prepared.hospitals]
    assert sum(part.validation.num_units for part in parts) == len(np.unique(held.units))
    assert sum(part.validation.num_rows for part in parts) == len(held.targets)
    # Every picture is one of those that the simulation holds back, and none is in two hospitals.
    dealt = [picture.tobytes() for part in parts for picture in part.validation.inputs["image"]]
    assert sorted(dealt) == sorted(picture.tobytes() for picture in held.images)
    for part in parts:
        assert part.train.num_units
        assert not set(part.train.unit_ids) & set(part.validation.unit_ids)
    again = prepare(make_scenario({"data": str(data), "hospitals": 3, "out": str(tmp_path / "again")}))
    for hospital, part in zip(again.hospitals, parts, strict=True):
        _, repeated = hospital_images(again, hospital.name)
        assert repeated.validation.inputs["image"].tobytes() == part.validation.inputs["image"].tobytes()


def test_by_column_validation_patients_go_to_their_own_site(tmp_path: Path) -> None:
    def site_of(patient: int) -> str:
        return f"site-{patient % 3 % 2}"

    def split_of(patient: int) -> str:
        return ("train", "train", "val", "test")[patient // 3 % 4]

    rows = [(*row, split_of(int(row[2].rpartition("-")[2]))) for row in planted_rows(96, site_of)]
    table = write_films(tmp_path / "data", rows, header="path,label,patient,site,split")
    flags = {"data": str(table), "partition": "column:site", "image_size": 28, "out": str(tmp_path / "run")}
    prepared = prepare(make_scenario(flags))
    held = prepared.held_back.sets["validation"]
    for position, hospital in enumerate(prepared.hospitals):
        _, images = hospital_images(prepared, hospital.name)
        assert images.validation.num_rows == (held.hospitals == position).sum() > 0


def test_without_a_validation_split_simulated_hospitals_release_no_metrics(tmp_path: Path) -> None:
    prepared = prepare(make_scenario({"hospitals": 2, "out": str(tmp_path / "run")}))
    for hospital in prepared.hospitals:
        config, images = hospital_images(prepared, hospital.name)
        assert images.validation.num_units == 0
        assert config.release.metrics == ()
