"""One preprocessing from the federation's file to the answer: read, cached, trained on, scored, predicted."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from client.evaluation import score_patients
from client.images.cache import DecodeCache
from client.images.dataset import read_hospital_images
from client.images.parts import write_part
from client.images.phantoms import hospital_phantoms
from client.images.records import SkipReason
from client.prediction.answers import answers
from client.prediction.inputs import find_inputs
from client.prediction.stored_model import read_model
from common.config import FederationConfig
from common.errors import DataError, ModelError
from common.hospital_config import DataConfig, HospitalConfig
from common.models.registry import build_model, load_parameters
from common.parameters import read_safetensors
from common.preprocessing import Preprocessing
from common.settings import load, parse, with_overrides
from common.tasks import make_task
from simulations.preparation import prepare
from simulations.reading import read_images
from simulations.scenario import make_scenario
from tests.client.images.medical_files import dicom
from tests.client.stored_models import CLASSES, SIZE, spec_of, store

LIMIT = 10**7
STEPS = (
    "preprocessing.clip-percentiles=[1, 99]",
    "preprocessing.mask=body",
    "preprocessing.crop=foreground",
    "preprocessing.resize=pad",
    "preprocessing.denoise=gaussian",
    "preprocessing.clahe=0.02",
    "preprocessing.mean=[0.4]",
    "preprocessing.standard-deviation=[0.3]",
)


def federation(*overrides, size=SIZE):
    values = {"data": {"image-size": size, "classes": CLASSES}, "model": {"activation": "relu"}}
    return parse(FederationConfig, with_overrides(values, overrides), source="test")


def films(folder, *, patients=8, split="test"):
    """Phantoms as PNG, JPEG and DICOM of several sizes, in split/class folders; returns the folder."""
    made = hospital_phantoms(hospital=1, num_patients=patients, image_size=80, seed=3)
    for number, (pixels, label) in enumerate(zip(made.images, made.labels, strict=True)):
        place = folder / split / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        shown = pixels[: 80 - number % 7]
        if number % 3 == 2:
            (place / f"{number:03d}.dcm").write_bytes(dicom(shown.astype(np.uint16) * 16))
        else:
            Image.fromarray(shown).save(place / f"{number:03d}.{('png', 'jpg')[number % 2]}")
    return folder


def read(path, preprocessing, *, cache=None, share=0.0):
    data = DataConfig(path=str(path), max_skipped_share=share)
    return read_hospital_images(data, preprocessing=preprocessing, classes=CLASSES, cache_folder=cache)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return films(tmp_path_factory.mktemp("films"))


def test_prediction_prepares_as_evaluation_and_says_the_same(tmp_path, folder):
    plan = federation(*STEPS)
    preprocessing = Preprocessing.of(plan)
    model = store(tmp_path / "run", spec_of(), preprocessing=json.loads(json.dumps(preprocessing.to_dict())))
    images = read(folder, preprocessing, cache=tmp_path / "cache")
    network = build_model(plan.model_spec)
    load_parameters(network, read_safetensors(model / "model.safetensors"))
    said, _ = score_patients(
        network,
        make_task("classification", CLASSES),
        images.test,
        plan=plan,
        device=torch.device("cpu"),
        deadline=math.inf,
    )
    stored = read_model(model)
    assert stored.preprocessing == preprocessing
    found = [
        answer.probabilities
        for answer in answers(stored, find_inputs([folder], max_pixels=LIMIT), max_pixels=LIMIT)
    ]
    ours = np.array([[row[name] for name in CLASSES] for row in found])
    np.testing.assert_allclose(ours[np.lexsort(ours.T)], said[np.lexsort(said.T)], rtol=0, atol=1e-6)
    plain = read(folder, Preprocessing.of(federation())).test.inputs["image"]
    assert np.abs(plain.astype(int) - images.test.inputs["image"]).mean() > 5, "the steps do something"


def test_the_cache_tells_preprocessings_apart_but_not_standardisations(tmp_path, folder):
    ways = [Preprocessing.of(federation(*steps)) for steps in ((), STEPS[:1], STEPS[:2], STEPS)]
    fresh = [read(folder, way).test.inputs["image"] for way in ways]
    for _ in range(2):
        for way, expected in zip(ways, fresh, strict=True):
            found = read(folder, way, cache=tmp_path / "cache").test.inputs["image"]
            assert np.array_equal(found, expected)
    kept = len(list((tmp_path / "cache").rglob("*.npy")))
    assert kept == len(ways)
    read(folder, Preprocessing.of(federation(*STEPS[:-2])), cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == kept
    keys = {DecodeCache(tmp_path / "cache", way, max_pixels=9)._key(["a"]) for way in ways}
    assert len(keys) == len(ways)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (["preprocessing.window=[40, 400]"], SkipReason.NO_UNITS),
        (
            ["preprocessing.crop=centre", "preprocessing.crop-share=0.2", "data.image-size=48"],
            SkipReason.TOO_SMALL,
        ),
        (["preprocessing.colour=refuse", "data.channels=3"], SkipReason.GREY),
    ],
)
def test_what_cannot_be_prepared_is_named_in_the_hospital_and_at_prediction(tmp_path, folder, steps, reason):
    plan = federation(*steps)
    preprocessing = Preprocessing.of(plan)
    with pytest.raises(DataError) as caught:
        read(folder, preprocessing)
    assert reason.value in caught.value.why
    assert reason.remedy in caught.value.fix
    spec = spec_of(size=plan.data.image_size, channels=plan.data.channels)
    stored = read_model(store(tmp_path / "run", spec, preprocessing=preprocessing.to_dict()))
    found = list(answers(stored, find_inputs([folder], max_pixels=LIMIT), max_pixels=LIMIT))
    assert {answer.reason for answer in found} == {reason.value}
    assert {answer.words for answer in found} == {reason.remedy}


def test_a_window_takes_the_ct_slice_and_refuses_the_export_beside_it(tmp_path):
    values = np.linspace(0, 2000, 64 * 64).reshape(64, 64).astype(np.uint16)
    for name, more in (("ct", {"RescaleSlope": "1", "RescaleIntercept": "-1000"}), ("raw", {})):
        for label in CLASSES:
            place = tmp_path / name / "train" / label
            place.mkdir(parents=True)
            (place / "a.dcm").write_bytes(dicom(values, **more))
    preprocessing = Preprocessing.of(federation("preprocessing.window=[40, 400]"))
    pixels = read(tmp_path / "ct", preprocessing).train.inputs["image"]
    shown = ((values[::2, ::2].astype(float) - 1040) / 400 + 0.5).clip(0, 1) * 255
    assert np.abs(pixels[0, 0].astype(float) - shown).mean() < 12
    with pytest.raises(DataError, match="not one usable image") as caught:
        read(tmp_path / "raw", preprocessing)
    assert "other-units" in caught.value.why


def test_a_model_of_unknown_steps_is_refused(tmp_path):
    stored = Preprocessing.of(federation(*STEPS)).to_dict()
    stored["steps"] = stored["steps"] | {"deconvolve": True}
    with pytest.raises(ModelError, match="does not describe a model"):
        read_model(store(tmp_path / "run", spec_of(), preprocessing=stored))


def test_a_simulated_hospital_prepares_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = films(tmp_path / "films", patients=40, split="train")
    flags = {
        "data": str(data),
        "image_size": SIZE,
        "hospitals": 2,
        "set": [*STEPS, "privacy.minimum-noise-multiplier=0.5"],
        "out": str(tmp_path / "run"),
    }
    scenario = make_scenario(flags)
    once = read_images(scenario).decoded.examples.inputs["image"]
    ready = prepare(scenario)
    assert ready.config.preprocessing == federation(*STEPS).preprocessing
    parts = []
    for hospital in ready.hospitals:
        config = load(HospitalConfig, ready.folder / "hospitals" / hospital.name / "hospital.toml")
        images = read_hospital_images(
            config.data,
            preprocessing=Preprocessing.of(ready.config),
            classes=ready.config.data.classes,
            cache_folder=None,
        )
        parts += [images.train.inputs["image"], images.validation.inputs["image"]]
        with pytest.raises(DataError, match="prepared for another preprocessing"):
            read_hospital_images(
                config.data,
                preprocessing=Preprocessing.of(federation(*STEPS[:2])),
                classes=ready.config.data.classes,
                cache_folder=None,
            )
    known = {pixels.tobytes() for pixels in once}
    found = [pixels.tobytes() for part in parts for pixels in part]
    assert found
    assert set(found) <= known


def test_a_part_without_steps_carries_no_mark(tmp_path, folder):
    images = read(folder, Preprocessing.of(federation()))
    path = write_part(tmp_path / "p.npz", train=images.test, classes=CLASSES, unit="image")
    assert "prepared" not in np.load(path).files


def test_heat_is_laid_over_what_the_model_sees_where_places_moved(tmp_path, folder):
    """Over the whole picture it would lie beside what it speaks of."""
    for steps, moved in ((STEPS[:1], False), (STEPS, True)):
        preprocessing = Preprocessing.of(federation(*steps))
        path = tmp_path / str(moved)
        stored = read_model(store(path, spec_of(), preprocessing=preprocessing.to_dict()))
        inputs = find_inputs([folder], max_pixels=LIMIT)
        for answer in answers(stored, inputs, max_pixels=LIMIT, with_heat=True, with_pictures=True):
            whole = answer.picture.width <= 80
            assert whole is not moved
            assert answer.heat is not None
