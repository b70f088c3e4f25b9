"""`flower-client predict`: the answers are evaluation's, and what cannot be answered is named."""

import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from client import cli
from client.evaluation import score_patients
from client.images.dataset import read_hospital_images
from client.images.phantoms import hospital_phantoms
from client.prediction.answers import answers, decide
from client.prediction.case_page import case_page
from client.prediction.doubts import Rule, find_doubt, inversion_score
from client.prediction.inputs import find_inputs
from client.prediction.stored_model import read_model
from common.config import PublicPlan
from common.errors import ConfigError, ModelError
from common.hospital_config import DataConfig
from common.models.registry import build_model, load_parameters
from common.parameters import read_safetensors
from common.preprocessing import Preprocessing
from common.settings import parse
from common.tasks import make_task
from tests.client.images.medical_files import dicom
from tests.client.stored_models import CLASSES, SIZE, spec_of, store

LIMIT = 10**7


@pytest.fixture(scope="module")
def films():
    return hospital_phantoms(hospital=1, num_patients=20, image_size=80, seed=3)


@pytest.fixture
def model(tmp_path):
    return store(tmp_path / "run", spec_of())


def predict(capsys, monkeypatch, *words):
    """Exit code, and what `--format json` says."""
    monkeypatch.setattr(sys, "argv", ["flower-client", "predict", *map(str, words), "--format", "json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    return ended.value.code, json.loads(shown.out) if shown.out else shown.err


def film(folder, name, pixels, **options):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(folder / name, **options)
    return folder / name


# --- the same numbers as in evaluation ---


def test_probabilities_are_those_of_evaluation(tmp_path, model, films):
    """Other sizes, depths and formats than the model's, through the hospital's own reading and scoring."""
    for number, (pixels, label) in enumerate(zip(films.images, films.labels, strict=True)):
        folder = tmp_path / "films" / "test" / CLASSES[label]
        name = f"{number:03d}.{('png', 'jpg', 'tif')[number % 3]}"
        if number % 5 == 4:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(dicom(pixels.astype(np.uint16) * 16))
        else:
            film(folder, name, pixels[: 80 - number % 7])
    preprocessing = Preprocessing(image_size=SIZE, channels=1)
    data = DataConfig(path=str(tmp_path / "films"))
    images = read_hospital_images(data, preprocessing=preprocessing, classes=CLASSES, cache_folder=None)
    values = {"data": {"image-size": SIZE, "classes": CLASSES}, "model": {"activation": "relu"}}
    plan = parse(PublicPlan, values, source="test")
    network = build_model(plan.model_spec)
    load_parameters(network, read_safetensors(model / "model.safetensors"))
    task = make_task("classification", CLASSES)
    said, _ = score_patients(
        network, task, images.test, plan=plan, device=torch.device("cpu"), deadline=math.inf
    )
    inputs = find_inputs([tmp_path / "films"], max_pixels=LIMIT)
    found = [answer.probabilities for answer in answers(read_model(model), inputs, max_pixels=LIMIT)]
    assert len(found) == len(films.images)
    ours = np.array([[row[name] for name in CLASSES] for row in found])
    np.testing.assert_allclose(ours[np.lexsort(ours.T)], said[np.lexsort(said.T)], rtol=0, atol=1e-6)


def test_decisions_follow_the_stored_point_or_the_most_probable_class(tmp_path, films):
    point = {"threshold": 0.7, "source": "noised counts"}
    bins = [{"lower": 0.0, "upper": 1.0, "patients": 9.0, "observed": 0.25}]
    stored = read_model(store(tmp_path / "a", spec_of(), operating_point=point, calibration=bins))
    said = np.array([[0.3, 0.7], [0.31, 0.69], [0.5, 0.5]])
    assert decide(said, threshold=stored.threshold).tolist() == [1, 0, 0]
    assert decide(said, threshold=None).tolist() == [1, 1, 0]
    assert "0.7, the stored operating point" in stored.rule
    path = film(tmp_path / "in", "a.png", films.images[0])
    (answer,) = answers(stored, find_inputs([path], max_pixels=LIMIT), max_pixels=LIMIT)
    assert answer.observed == 0.25
    assert answer.calibrated is None
    assert "no operating point" in read_model(store(tmp_path / "b", spec_of())).rule


def test_the_calibrated_probability_stands_beside_the_raw_one(tmp_path, films, capsys, monkeypatch):
    points = {"method": "isotonic", "said": [0.0, 1.0], "so": [0.2, 0.6]}
    stored = read_model(store(tmp_path / "a", spec_of(), recalibration=points))
    path = film(tmp_path / "in", "a.png", films.images[0])
    (answer,) = answers(stored, find_inputs([path], max_pixels=LIMIT), max_pixels=LIMIT)
    raw = answer.probabilities[CLASSES[1]]
    assert answer.calibrated[CLASSES[1]] == pytest.approx(0.2 + 0.4 * raw)
    assert sum(answer.calibrated.values()) == pytest.approx(1.0)
    code, told = predict(capsys, monkeypatch, tmp_path / "a", path)
    (found,) = told["images"]
    assert code == 0
    assert found["calibrated"] == pytest.approx(dict(answer.calibrated))
    assert found["probabilities"][CLASSES[1]] == pytest.approx(raw)
    monkeypatch.setattr(sys, "argv", ["flower-client", "predict", str(tmp_path / "a"), str(path)])
    with pytest.raises(SystemExit):
        cli.main()
    table = capsys.readouterr().out
    assert "calibrated" in table
    assert f"{answer.calibrated[CLASSES[1]]:.3f}" in table
    page = case_page(answer, stored)
    assert "calibrated on noised counts" in page


@pytest.mark.parametrize(
    "points",
    [
        {"said": [0.1, 0.9], "so": [0.5]},
        {"said": [0.9, 0.1], "so": [0.1, 0.9]},
        {"said": [0.1], "so": [1.5]},
        {"said": [], "so": []},
        {"said": [0.1]},
        {"said": [float("nan")], "so": [0.5]},
    ],
)
def test_a_broken_correction_is_refused(tmp_path, points):
    with pytest.raises(ModelError, match="does not describe a model"):
        read_model(store(tmp_path / "a", spec_of(), recalibration=points))


# --- what is not answered ---


def photograph(size):
    rows, columns = np.mgrid[:size, :size] * 255 // size
    return np.stack([rows, columns, 255 - rows], axis=-1).astype(np.uint8)


def broken(rule, grey):
    noise = np.random.default_rng(0).integers(0, 2, grey.shape)
    return {
        Rule.TOO_SMALL: grey[:15, :15],
        Rule.EXTREME_ASPECT: np.tile(grey, (4, 1)),
        Rule.BLACK: np.zeros_like(grey) + noise,
        Rule.CONSTANT: np.full_like(grey, 90) + noise,
        Rule.LOW_CONTRAST: 100 + grey // 32,
        Rule.COLOURED: photograph(80),
        Rule.INVERTED: 255 - grey,
    }[rule].astype(np.uint8)


@pytest.mark.parametrize("rule", [rule for rule in Rule if rule is not Rule.UNLIKE_REFERENCE])
def test_every_rule_refuses_its_picture_and_can_be_switched_off(films, rule):
    prepared = Preprocessing(image_size=SIZE, channels=1)
    picture = Image.fromarray(broken(rule, films.images[0]))
    doubt = find_doubt(picture, prepared)
    assert doubt is not None
    assert doubt.rule is rule
    left = find_doubt(picture, prepared, without=frozenset([rule]))
    assert left is None or left.rule is not rule


def test_good_films_and_a_colour_models_pictures_pass(films):
    grey, colour = (Preprocessing(image_size=SIZE, channels=channels) for channels in (1, 3))
    doubts = [find_doubt(Image.fromarray(pixels), grey) for pixels in films.images]
    assert doubts == [None] * len(doubts)
    stamped = np.repeat(films.images[0][..., None], 3, axis=-1)
    stamped[:8, :8] = (255, 0, 0)
    assert find_doubt(Image.fromarray(stamped), grey) is None
    assert find_doubt(Image.fromarray(photograph(80)), colour) is None


def test_a_negative_scores_the_opposite(films):
    for pixels in films.images[:5]:
        assert inversion_score(255 - pixels) == pytest.approx(-inversion_score(pixels), abs=0.05)


@pytest.mark.audit
@pytest.mark.parametrize("name", ["kermany_cxr", "covid_cxr_sites", "mednist"])
def test_real_films_pass_and_their_negatives_do_not(shared_data, name):
    """False alarms of all rules, negatives that are found: as docs/predict.md states them."""
    prepared = Preprocessing(image_size=28, channels=1)
    paths = sorted(
        p for p in (shared_data / name).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    alarms, found = [], []
    for path in paths[:: max(1, len(paths) // 600)]:
        with Image.open(path) as image:
            grey = image.convert("L")
        alarms.append(find_doubt(grey, prepared) is not None)
        found.append(find_doubt(Image.fromarray(255 - np.asarray(grey)), prepared) is not None)
    assert np.mean(alarms) < 0.02
    assert np.mean(found) > 0.9


def test_files_that_cannot_be_read_have_the_readers_reasons(tmp_path, capsys, monkeypatch, model, films):
    folder = tmp_path / "films"
    good = film(folder, "good.png", films.images[0])
    (folder / "cut.jpg").write_bytes(film(tmp_path / "b", "b.jpg", films.images[1]).read_bytes()[:300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.dcm").write_text("no image")
    (folder / "notes.txt").write_text("never was an image")
    (folder / "out.png").symlink_to(tmp_path / "b" / "b.jpg")
    code, said = predict(capsys, monkeypatch, model, folder, tmp_path / "gone.png")
    reasons = {os.path.basename(line["file"]): line["reason"] for line in said["images"]}
    assert code == 1
    assert reasons == {
        "cut.jpg": "truncated",
        "empty.png": "empty",
        "good.png": None,
        "gone.png": "missing",
        "out.png": "escaping",
        "text.dcm": "unreadable",
    }
    assert said["answered"] == 1
    code, said = predict(capsys, monkeypatch, model, good)
    assert code == 0
    assert sum(said["images"][0]["probabilities"].values()) == pytest.approx(1)


def test_a_folder_of_slices_is_one_picture_and_other_dicom_files_are_their_own(tmp_path, films):
    def slices(folder, series, count):
        folder.mkdir(parents=True)
        for place in range(count):
            where = {
                "ImagePositionPatient": [0, 0, 5.0 * place],
                "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            }
            content = dicom(films.images[place].astype(np.uint16), SeriesInstanceUID=series[place], **where)
            (folder / f"{place}.dcm").write_bytes(content)

    slices(tmp_path / "ct", ["1.2.3"] * 3, 3)
    slices(tmp_path / "films", ["1.2.4", "1.2.5"], 2)
    film(tmp_path / "ct", "report.png", films.images[0])
    found = find_inputs([tmp_path / "ct", tmp_path / "films"], max_pixels=LIMIT)
    names = [asked.name.removeprefix(f"{tmp_path}/") for asked in found]
    assert names == ["ct", "ct/report.png", "films/0.dcm", "films/1.dcm"]
    stored = read_model(store(tmp_path / "run", spec_of()))
    said = list(answers(stored, found[:1], max_pixels=LIMIT))
    (middle,) = answers(stored, find_inputs([tmp_path / "ct" / "1.dcm"], max_pixels=LIMIT), max_pixels=LIMIT)
    assert said[0].probabilities == pytest.approx(middle.probabilities)


# --- models that cannot be used ---


def test_a_model_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no finished model"):
        read_model(tmp_path)
    altered = store(tmp_path / "altered", spec_of(), sha256="0" * 64)
    with pytest.raises(ModelError, match="is not the model"):
        read_model(altered)
    other = Preprocessing(image_size=SIZE, channels=1).to_dict() | {"centre": 0.4}
    with pytest.raises(ModelError, match="does not describe"):
        read_model(store(tmp_path / "other", spec_of(), preprocessing=other))
    with pytest.raises(ModelError, match="does not describe"):
        read_model(store(tmp_path / "mixed", spec_of(), classes=("a", "b", "c")))
    torn = store(tmp_path / "torn", spec_of())
    (torn / "manifest.json").write_text('{"files": {"model.json": {"sha256": "", "bytes": 1}}}')
    with pytest.raises(ModelError, match="is damaged"):
        read_model(torn)


def test_settings_that_cannot_be_used_end_with_2(tmp_path, capsys, monkeypatch, model, films):
    path = film(tmp_path / "films", "a.png", films.images[0])
    (tmp_path / "none").mkdir()
    asked = {
        "among the images": (model, path, "--page", path.parent),
        "no check": (model, path, "--without-check", "weather"),
        "no image": (model, tmp_path / "none"),
        "no heat map": (store(tmp_path / "s", spec_of("softmax")), path, "--heat-map", tmp_path / "heat"),
    }
    for words, arguments in asked.items():
        code, said = predict(capsys, monkeypatch, *arguments)
        assert code == 2
        assert words in said
    assert [entry.name for entry in path.parent.iterdir()] == ["a.png"]
