"""Decisions and heat maps of models that say more than one class."""

import numpy as np
import pytest
import torch

from client.prediction.answers import answers
from client.prediction.decisions import decisions, explained_classes, findings_called, rule
from client.prediction.inputs import find_inputs
from client.prediction.stored_model import read_model
from client.prediction.task_scores import ScoreOfEach
from common.errors import ModelError
from common.tasks import make_task
from tests.client.stored_models import SIZE, spec_of, store

FINDINGS, LEVELS = ("edema", "mass"), ("none", "mild", "severe")


def test_each_finding_is_called_from_its_own_operating_point_on():
    task = make_task("multi-label", FINDINGS)
    said = np.array([[0.3, 0.5], [0.29, 0.51], [0.9, 0.9], [0.1, 0.1]])
    with_points = decisions(task, said, threshold=None, thresholds=(0.3, None))
    assert with_points == ["edema", "mass", "edema, mass", "no finding"]
    assert decisions(task, said, threshold=None, thresholds=()) == [
        "no finding",
        "mass",
        "edema, mass",
        "no finding",
    ]
    assert findings_called(np.full((1, 2), np.nan), (0.3, None)).tolist() == [[False, False]]
    assert rule(task, threshold=None, thresholds=(0.3, None)) == (
        "edema from 0.3 on; every other finding above 0.5"
    )
    assert rule(task, threshold=None, thresholds=(0.3, 0.4)) == "edema from 0.3 on; mass from 0.4 on"
    assert "stores no operating points" in rule(task, threshold=None, thresholds=())


def test_a_level_is_the_highest_that_is_reached():
    task = make_task("ordinal", LEVELS)
    said = np.array([[0.3, 0.3, 0.4], [0.6, 0.1, 0.3], [0.1, 0.3, 0.6]])
    assert decisions(task, said, threshold=None, thresholds=()) == ["mild", "none", "severe"]
    assert explained_classes(task, said).tolist() == [1, 0, 2]


def test_a_heat_map_explains_the_score_of_the_class_itself():
    network = torch.nn.Linear(4, 2)
    inputs = torch.randn(5, 4)
    outputs = network(inputs).detach().numpy()
    assert np.array_equal(ScoreOfEach(network, "multi-label")(inputs).detach(), outputs)
    scores = ScoreOfEach(network, "ordinal")(inputs).detach().numpy()
    said = make_task("ordinal", LEVELS).probabilities(outputs)
    reached = np.stack([said[:, 0], 1 - said[:, 0], said[:, 2]], axis=1)
    np.testing.assert_allclose(1 / (1 + np.exp(-scores)), reached, rtol=1e-5)


@pytest.mark.parametrize(("task", "classes"), [("multi-label", FINDINGS), ("ordinal", LEVELS)])
def test_a_stored_model_of_a_task_answers_with_a_heat_map(tmp_path, task, classes):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "film.png")
    spec = spec_of(size=SIZE, classes=("x",) * make_task(task, classes).num_outputs)
    folder = store(tmp_path / "run", spec, classes=classes, task=task, loss="bce")
    stored = read_model(folder)
    inputs = find_inputs([tmp_path / "film.png"], max_pixels=10**6)
    (answer,) = answers(stored, inputs, max_pixels=10**6, with_heat=True)
    assert answer.reason == ""
    assert list(answer.probabilities) == list(classes)
    assert answer.heat.shape[0] > 1
    assert answer.explained in classes


def test_operating_points_that_do_not_fit_are_refused(tmp_path):
    spec = spec_of(classes=FINDINGS)
    points = [{"threshold": 0.3}]
    folder = store(
        tmp_path / "a", spec, classes=FINDINGS, task="multi-label", loss="bce", operating_points=points
    )
    with pytest.raises(ModelError, match="does not describe a model"):
        read_model(folder)
