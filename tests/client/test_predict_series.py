"""`flower-client predict` on series: one answer for each, the same as in evaluation, or a named reason."""

import csv
import dataclasses

import numpy as np
import pytest

from client.images.dataset import read_hospital_images
from common.config import ModelSpec
from common.hospital_config import DataConfig
from common.models.registry import build_model, load_parameters
from common.parameters import read_safetensors
from common.preprocessing import Preprocessing
from common.scoring import input_probabilities
from common.series_form import SeriesForm
from common.tasks import make_task
from simulations.generated_data import write_generated_data
from tests.client.images.medical_files import nifti
from tests.client.stored_models import store
from tests.client.test_prediction import predict

SIDE = 20
CLASSES = ("not-worse", "worse")
NEXT = SeriesForm(kind="visits", steps=5, next_finding=True)


def stored(folder, form, name="gru"):
    spec = ModelSpec(
        name=name, activation="tanh", channels=1, image_size=SIDE, num_outputs=2, steps=form.steps
    )
    task = "progression" if form.next_finding else "classification"
    return store(folder, spec, classes=CLASSES, task=task, series=dataclasses.asdict(form))


@pytest.fixture(scope="module")
def visits(tmp_path_factory):
    """A manifest of generated visits, and its rows by patient in order of time."""
    folder = tmp_path_factory.mktemp("visits")
    path = write_generated_data(
        folder, layout="csv", hospitals=1, patients_per_hospital=8, image_size=SIDE, seed=1, visits=True
    )
    rows_of = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            rows_of.setdefault(row["patient"], []).append(row)
    return path, {who: sorted(rows, key=lambda row: int(row["days"])) for who, rows in rows_of.items()}


def test_answers_about_a_table_are_those_of_evaluation(tmp_path, monkeypatch, capsys, visits):
    path, rows_of = visits
    model = stored(tmp_path / "run", NEXT)
    seen = path.parent / "seen.csv"  # what a hospital has before the visit that is foretold
    lines = [f"{row['filename']},{who},{row['days']}" for who, rows in rows_of.items() for row in rows[:-1]]
    seen.write_text("\n".join(["filename,patient,days", *reversed(lines)]))
    code, said = predict(capsys, monkeypatch, model, seen, "--without-check", "inverted")
    assert code == 0, said
    images = read_hospital_images(
        DataConfig(path=str(path)),
        preprocessing=Preprocessing(image_size=SIDE, channels=1),
        classes=CLASSES,
        cache_folder=None,
        form=NEXT,
    )
    network = build_model(
        ModelSpec(name="gru", activation="tanh", channels=1, image_size=SIDE, num_outputs=2, steps=5)
    )
    load_parameters(network, read_safetensors(model / "model.safetensors"))
    answered = {line["file"].split(": ")[1]: line["probabilities"]["worse"] for line in said["images"]}
    assert set(answered) == set(rows_of)
    for part in (images.train, images.validation, images.test):
        expected = input_probabilities(
            network.eval(),
            make_task("progression", CLASSES),
            part.inputs,
            preprocessing=Preprocessing(image_size=SIDE, channels=1),
        )
        for unit, row in zip(part.units, expected, strict=True):
            assert answered[part.unit_ids[unit]] == pytest.approx(row[1], abs=1e-6)
    assert said["passport"]["Answers about"].startswith("series of up to 5 visits")


def test_a_folder_is_one_patient_whose_files_say_when(tmp_path, monkeypatch, capsys, visits):
    path, rows_of = visits
    model = stored(tmp_path / "run", NEXT)
    rows = max(rows_of.values(), key=len)[:3]
    for number, row in enumerate(rows):
        target = tmp_path / "dated" / f"20{10 + number}-01-01 film.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((path.parent / row["filename"]).read_bytes())
    (tmp_path / "undated").mkdir()
    for name, row in zip("ab", rows, strict=False):
        (tmp_path / "undated" / f"{name}.png").write_bytes((path.parent / row["filename"]).read_bytes())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "2020-01-01.png").write_bytes(b"no picture")
    folders = [tmp_path / name for name in ("dated", "undated", "broken")]
    code, said = predict(capsys, monkeypatch, model, *folders, "--without-check", "inverted")
    assert code == 1
    assert [line["reason"] for line in said["images"]] == [None, "unknown-time", "unreadable"]
    assert "step 1 of 1" in said["images"][2]["what"]


def test_a_volume_is_one_answer(tmp_path, monkeypatch, capsys):
    model = stored(tmp_path / "run", SeriesForm(kind="slices", steps=4), name="lstm")
    voxels = np.random.default_rng(0).integers(0, 255, (30, 30, 9), dtype=np.uint8)
    (tmp_path / "brain.nii").write_bytes(nifti(voxels))
    code, said = predict(capsys, monkeypatch, model, tmp_path / "brain.nii", "--without-check", "inverted")
    assert code == 0
    assert len(said["images"]) == 1


def test_a_heat_map_of_a_series_is_refused(tmp_path, monkeypatch, capsys, visits):
    model = stored(tmp_path / "run", NEXT)
    code, said = predict(capsys, monkeypatch, model, visits[0], "--heat-map", tmp_path / "maps")
    assert code != 0
    assert "no heat map" in said


def test_a_model_whose_steps_do_not_fit_is_refused(tmp_path, monkeypatch, capsys, visits):
    spec = ModelSpec(name="gru", channels=1, image_size=SIDE, num_outputs=2, steps=4)
    model = store(tmp_path / "run", spec, classes=CLASSES, series=dataclasses.asdict(NEXT))
    code, said = predict(capsys, monkeypatch, model, visits[0])
    assert code == 2
    assert "4 steps" in said
