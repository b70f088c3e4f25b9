"""A site's own images tell a grey picture of something else, and pass pictures of their own kind."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from client import cli
from client.images.phantoms import hospital_phantoms
from client.prediction.doubts import find_doubt
from client.prediction.reference import FEWEST, NEIGHBOURS, Reference, features
from common.errors import ConfigError
from common.models.generated_images import generated_images
from common.preprocessing import Preprocessing
from tests.client.stored_models import SIZE, spec_of, store


def films(patients, *, seed=3, hospital=1):
    found = hospital_phantoms(hospital=hospital, num_patients=patients, image_size=64, seed=seed)
    return [Image.fromarray(pixels) for pixels in found.images]


def photographs():
    """Parts of the two photographs that scikit-learn ships, in grey."""
    found = []
    for pixels in load_sample_images().images:
        grey = Image.fromarray(pixels).convert("L")
        found += [grey.crop((x, y, x + 200, y + 200)) for x in (0, 200, 400) for y in (0, 200)]
    return found


@pytest.fixture(scope="module")
def own():
    return films(120)


def test_other_pictures_are_flagged_and_ones_own_pass(own):
    reference = Reference.of(own[:150])
    assert (reference.strangeness(features(own[150:])) > 1).mean() < 0.1
    noise = [Image.fromarray(np.rint(p * 255).astype(np.uint8)) for p in generated_images(40, 64)]
    for other in (photographs(), noise, [film.rotate(90) for film in own[150:]]):
        assert (reference.strangeness(features(other)) > 1).mean() > 0.95
    grey = Preprocessing(image_size=SIZE, channels=1)
    passed = [find_doubt(picture, grey) is None for picture in photographs()]
    assert np.mean(passed) > 0.5  # the fixed rules do not know them


def test_distances_are_those_to_the_nearest_others(own):
    found = features(own[: FEWEST + 5])
    reference = Reference.fitted(found)
    spread = found.std(axis=0) + 1e-3
    points = (found - found.mean(axis=0)) / spread
    every = np.linalg.norm(points[:, None] - points[None], axis=2)
    others = np.sort(every, axis=1)[:, 1 : NEIGHBOURS + 1].mean(axis=1)
    assert reference.limit == pytest.approx(np.quantile(others, 0.995), rel=1e-6)
    asked = np.sort(every, axis=1)[:, :NEIGHBOURS].mean(axis=1) / reference.limit
    np.testing.assert_allclose(reference.strangeness(found), asked, atol=1e-5)
    brighter = [Image.fromarray((np.asarray(film) // 2 + 60).astype(np.uint8)) for film in own[:5]]
    assert np.abs(reference.strangeness(features(brighter)) - asked[:5]).max() < 0.2
    with pytest.raises(ConfigError, match="too few"):
        Reference.fitted(found[: FEWEST - 1])


def test_predict_takes_a_folder_of_references(tmp_path, own, capsys, monkeypatch):
    model = store(tmp_path / "run", spec_of())
    for number, film in enumerate(own[:60]):
        (tmp_path / "own").mkdir(exist_ok=True)
        film.save(tmp_path / "own" / f"{number}.png")
    own[100].save(tmp_path / "film.png")
    grey = Preprocessing(image_size=SIZE, channels=1)
    passing = [picture for picture in photographs() if find_doubt(picture, grey) is None]
    passing[0].save(tmp_path / "photograph.png")
    asked = [model, tmp_path / "film.png", tmp_path / "photograph.png"]
    reasons = []
    for more in ([], ["--reference", tmp_path / "own"]):
        words = ["flower-client", "predict", *asked, *more, "--format", "json"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit):
            cli.main()
        said = json.loads(capsys.readouterr().out)
        reasons.append([line["reason"] for line in said["images"]])
    assert reasons == [[None, None], [None, "unlike-reference"]]
