"""Heat maps follow the model and point at what was planted; pages are whole, safe and say what they must."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from client.images.phantoms import hospital_phantoms
from client.prediction.answers import Answer, answers
from client.prediction.case_page import case_page, write_heat_map, write_page
from client.prediction.heat_map import heat_maps, overlay, resized
from client.prediction.heat_method import HeatMethod
from client.prediction.inputs import find_inputs
from client.prediction.stored_model import read_model
from common.models.registry import build_model, initial_parameters, load_parameters
from common.preprocessing import Preprocessing
from tests.client.images.medical_files import dicom
from tests.client.stored_models import SIZE, spec_of, store, train_on_phantoms
from tests.run_folders import build_run

HOSTILE = "<img src=x onerror=alert(1)>&\"'.png"
LIMIT = 10**7
SIDE = 64


@pytest.fixture(scope="module")
def trained():
    return train_on_phantoms(spec_of(size=SIDE), epochs=6)


def pointing_game(spec, weights, *, hospital=5, patients=120):
    """Share of the unseen phantoms with an opacity whose hottest place lies on one, and the share of area."""
    films = hospital_phantoms(hospital=hospital, num_patients=patients, image_size=spec.image_size, seed=11)
    rows = np.flatnonzero(films.labels == 1)
    network = build_model(spec).eval()
    load_parameters(network, weights)
    prepared = Preprocessing(image_size=spec.image_size, channels=1)
    images = films.images[rows][:, None]
    found = heat_maps(network, images, np.ones(len(rows), np.int64), preprocessing=prepared)
    hits, areas = [], []
    for heat, boxes in zip(found, films.opacity_boxes[rows], strict=True):
        full = resized(heat, (spec.image_size, spec.image_size))
        y, x = np.unravel_index(full.argmax(), full.shape)
        planted = np.zeros_like(full, bool)
        for left, top, right, bottom in boxes:
            planted[top:bottom, left:right] = True
        hits.append(planted[y, x])
        areas.append(planted.mean())
    return float(np.mean(hits)), float(np.mean(areas))


def test_the_heat_lies_on_what_was_planted(trained):
    hits, area = pointing_game(spec_of(size=SIDE), trained)
    assert hits > 0.5 > 2 * area


@pytest.mark.audit
@pytest.mark.parametrize("seed", range(2))
def test_the_heat_of_a_model_trained_longer_lies_there_four_times_of_five(seed):
    spec = spec_of(size=SIDE)
    weights = train_on_phantoms(spec, epochs=8, seed=seed)
    assert pointing_game(spec, weights, patients=300)[0] >= 0.8


def test_other_weights_give_another_map(trained):
    films = hospital_phantoms(hospital=6, num_patients=10, image_size=SIDE, seed=2).images[:, None]
    prepared, spec = Preprocessing(image_size=SIDE, channels=1), spec_of(size=SIDE)
    network = build_model(spec).eval()
    maps = []
    for weights in (trained, initial_parameters(spec, 7)):
        load_parameters(network, weights)
        classes = np.ones(len(films), np.int64)
        maps.append(heat_maps(network, films, classes, preprocessing=prepared).reshape(len(films), -1))
    alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(*maps, strict=True) if a.any() and b.any()]
    assert np.mean(np.nan_to_num(alike)) < 0.5


@pytest.mark.parametrize("name", ["cnn1", "cnn2", "cnn", "cnn-flatten", "resnet18"])
def test_every_convolutional_model_has_maps_and_where_nothing_is_hot_the_picture_stays(name):
    spec = spec_of(name)
    network = build_model(spec).eval()
    load_parameters(network, initial_parameters(spec, 1))
    images = np.random.default_rng(0).integers(0, 256, (2, 1, SIZE, SIZE), dtype=np.uint8)
    prepared = Preprocessing(image_size=SIZE, channels=1)
    heat = heat_maps(network, images, np.array([0, 1]), preprocessing=prepared)
    assert heat.shape[0] == 2
    assert heat.shape[1] == heat.shape[2] > 1
    assert heat.min() >= 0
    assert heat.max() <= 1
    plain = Image.fromarray(images[0, 0])
    unchanged = overlay(plain, np.zeros_like(heat[0]))
    assert np.array_equal(np.asarray(unchanged), np.asarray(plain.convert("RGB")))


class Elements(HTMLParser):
    """Every element with its attributes, and all text."""

    def __init__(self):
        super().__init__()
        self.found, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def stored(tmp_path, trained):
    build_run(tmp_path / "run")
    weights = store(tmp_path / "model", spec_of(size=SIDE), trained, classes=("normal", "<i>opacity</i>"))
    (weights / "result.json").write_bytes((tmp_path / "run" / "result.json").read_bytes())
    return read_model(weights)


def test_a_page_is_whole_loads_nothing_and_escapes_names(tmp_path, stored):
    folder = tmp_path / "films"
    folder.mkdir()
    Image.fromarray(hospital_phantoms(hospital=1, num_patients=1, image_size=64, seed=1).images[0]).save(
        folder / "a.png"
    )
    (folder / "a.png").rename(folder / HOSTILE.replace("/", ""))
    (answer,) = answers(
        stored,
        find_inputs([folder], max_pixels=LIMIT),
        max_pixels=LIMIT,
        with_pictures=True,
        with_heat=HeatMethod.COMBINED,
    )
    page = write_page(tmp_path / "pages", 1, answer, stored)
    assert re.fullmatch(r"0001-[A-Za-z0-9_-]+\.html", page.name)
    text = page.read_text()
    elements = Elements()
    elements.feed(text)
    tags = [tag for tag, _ in elements.found]
    assert tags.count("img") == 2
    assert not {"script", "link", "iframe", "object", "i", "form", "a"} & set(tags)
    for _, attributes in elements.found:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attributes
    assert "url(" not in text
    assert "@import" not in text
    policies = [attributes.get("content") or "" for tag, attributes in elements.found if tag == "meta"]
    assert any("default-src 'none'" in policy for policy in policies)
    for wanted in (HOSTILE, "<i>opacity</i>", "Research use", "Privacy", "AUC .871", stored.rule):
        assert wanted in elements.text
    picture = write_heat_map(tmp_path / "heat", 1, answer)
    with Image.open(picture) as written:
        assert written.size == (64, 64)


def test_a_page_holds_nothing_of_a_header(tmp_path, stored):
    pixels = hospital_phantoms(hospital=1, num_patients=1, image_size=64, seed=1).images[0].astype(np.uint16)
    named = {"PatientName": "CANARY^DOE", "PatientID": "CANARY-7", "InstitutionName": "CANARY HOUSE"}
    path = tmp_path / "film.dcm"
    path.write_bytes(dicom(pixels, **named))
    (answer,) = answers(
        stored,
        find_inputs([path], max_pixels=LIMIT),
        max_pixels=LIMIT,
        with_pictures=True,
        with_heat=HeatMethod.COMBINED,
    )
    assert answer.is_answered
    assert "CANARY" not in case_page(answer, stored)
    assert b"CANARY" not in write_heat_map(tmp_path / "heat", 1, answer).read_bytes()


def test_a_page_says_why_there_is_no_answer(stored):
    page = case_page(Answer(name="a.png", probabilities=None, reason="black", words="it is black"), stored)
    assert "Not answered: black" in page
    assert "probability" not in page.split("The model")[0]
