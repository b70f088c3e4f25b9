"""Simulations of series: generated visits, how they are read, dealt out and kept, and what is refused."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from client.images.dataset import read_hospital_images
from client.images.phantom_visits import CLASSES, MOST_VISITS, draw_course, hospital_visits
from common.errors import ConfigError
from common.hospital_config import HospitalConfig
from common.preprocessing import Preprocessing
from common.series import lengths
from common.settings import load
from simulations import generated_images
from simulations.generated_data import write_generated_data
from simulations.held_back import read_held_back
from simulations.preparation import prepare
from simulations.reading import read_images
from simulations.scenario import make_scenario

VISITS = {"series": "visits", "task": "progression", "model": "lstm", "image_size": 20}


@pytest.fixture(autouse=True)
def _few_patients(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(generated_images, "PHANTOM_PATIENTS", 24)


def test_the_newest_image_tells_little_and_the_trend_much():
    course = draw_course(num_patients=4000, rng=np.random.default_rng(0))
    newest, rate, label = [], [], []
    ends = np.flatnonzero(np.diff(course.patient_of, append=-1)) + 1
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        assert 2 <= end - begin <= MOST_VISITS
        assert (np.diff(course.days[begin:end]) >= 45).all()
        seen = slice(begin, end - 1)
        grown = course.radius[seen][-1] - course.radius[seen][0]
        newest.append(course.radius[seen][-1])
        rate.append(grown / max(1, course.days[seen][-1] - course.days[seen][0]))
        label.append(course.labels[end - 1])
    assert 0.55 < roc_auc_score(label, newest) < 0.62
    assert roc_auc_score(label, rate) > 0.95
    assert 0.4 < np.mean(label) < 0.5


def test_generated_visits_are_the_same_again_and_bright_where_the_opacity_is():
    first = hospital_visits(hospital=2, num_patients=12, image_size=24, seed=5)
    again = hospital_visits(hospital=2, num_patients=12, image_size=24, seed=5)
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(
        first.images[:5], hospital_visits(hospital=2, num_patients=12, image_size=24, seed=6).images[:5]
    )
    assert first.classes == CLASSES
    assert len(first.days) == len(first.images)
    assert (first.opacity_boxes[:, 0, 2] > first.opacity_boxes[:, 0, 0]).all()
    with pytest.raises(ValueError, match="pixels"):
        hospital_visits(hospital=0, num_patients=1, image_size=4, seed=0)


def test_a_run_folder_keeps_series_and_a_patient_is_one_row(tmp_path):
    prepared = prepare(make_scenario(VISITS | {"out": str(tmp_path / "run")}))
    data = prepared.config.data
    assert (data.task, data.series, data.steps) == ("progression", "visits", MOST_VISITS - 1)
    assert prepared.config.privacy.max_images_per_patient == 1
    assert prepared.config.model_spec.steps == data.steps
    total = 0
    for hospital in prepared.hospitals:
        config = load(HospitalConfig, prepared.folder / "hospitals" / hospital.name / "hospital.toml")
        images = read_hospital_images(
            config.data,
            preprocessing=Preprocessing(image_size=20, channels=1),
            classes=data.classes,
            cache_folder=None,
            form=data.series_form,
        )
        assert images.train.num_rows == images.train.num_units == hospital.patients
        assert images.unit == "patient"
        total += hospital.patients
    held = read_held_back(prepared.folder / "held-back.npz").sets["test"]
    assert held.images.shape[1:] == (5, 1, 20, 20)
    assert total + len(held.targets) == 5 * 24
    assert np.bincount(lengths(held.inputs), minlength=6)[1:].sum() == len(held.targets)


@pytest.mark.parametrize("layout", ["csv", "npz", "folders"])
def test_every_layout_gives_the_same_visits(tmp_path, layout):
    generated = read_images(make_scenario(VISITS | {"hospitals": 2}))
    path = write_generated_data(
        tmp_path / layout, layout=layout, hospitals=2, patients_per_hospital=24, image_size=20, seed=0,
        visits=True,
    )  # fmt: skip
    read = read_images(make_scenario(VISITS | {"data": str(path)}))
    assert read.form == generated.form
    told = [
        {
            examples.unit_ids[unit]: (examples.inputs["image"][row].tobytes(), int(examples.targets[row]))
            for row, unit in enumerate(examples.units)
        }
        for examples in (generated.decoded.examples, read.decoded.examples)
    ]
    assert told[0] == told[1]


def test_what_does_not_go_together_is_refused(tmp_path):
    for flags, said in (
        ({"steps": 4}, "needs --series"),
        ({"task": "progression"}, "needs --series visits"),
        ({"series": "slices"}, "needs --data"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_scenario(flags)
    with pytest.raises(ConfigError, match="single images"):
        prepare(make_scenario(VISITS | {"model": "cnn-small", "out": str(tmp_path / "a")}))
    with pytest.raises(ConfigError, match="series"):
        prepare(make_scenario({"model": "lstm", "out": str(tmp_path / "b")}))
    with pytest.raises(ConfigError, match="--series"):
        prepare(make_scenario({"set": ("data.series=visits", "data.steps=4"), "out": str(tmp_path / "c")}))
