"""Classification as a task: losses that couple nothing, probabilities, sums with their sensitivity."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import softmax

from common.errors import ConfigError
from common.metrics import classification_metrics
from common.tasks import LOSS_CAP, Classification, Task, make_task

ROOT = Path(__file__).resolve().parents[2]
TWO, THREE = ("normal", "pneumonia"), ("bacterial", "normal", "viral")


def test_importing_tasks_loads_neither_torch_nor_scikit_learn():
    code = (
        "import sys, common.tasks as t; task = t.make_task('classification', ['a', 'b']);"
        "import numpy as np; task.probabilities(np.zeros((2, 2)));"
        "loaded = {'torch', 'sklearn', 'scipy'} & sys.modules.keys(); assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_make_task_knows_classification():
    task: Task = make_task("classification", list(THREE))
    assert (task.name, task.classes, task.num_outputs) == ("classification", THREE, 3)
    with pytest.raises(ConfigError, match="there is no task 'segmentation'"):
        make_task("segmentation", TWO)


@pytest.mark.parametrize(
    ("classes", "weights"),
    [
        (("a",), None),
        (("a", "a"), None),
        (TWO, (1.0,)),
        (TWO, (1.0, 0.0)),
        (TWO, (1.0, -1.0)),
        (TWO, (1.0, float("nan"))),
        (TWO, (1.0, float("inf"))),
    ],
)
def test_impossible_classes_and_weights_are_refused(classes, weights):
    with pytest.raises(ConfigError):
        make_task("classification", classes, class_weights=weights)


@pytest.mark.parametrize("weights", [None, (0.3, 5.0, 1.0)])
def test_losses_are_weighted_cross_entropy_of_each_record(weights):
    task = Classification(classes=THREE, class_weights=weights)
    outputs, targets = torch.randn(50, 3), torch.arange(50) % 3
    constants = np.ones(3) if weights is None else np.array(weights)
    probabilities = softmax(outputs.double().numpy(), axis=1)
    expected = -np.log(probabilities[np.arange(50), targets]) * constants[targets]
    np.testing.assert_allclose(task.losses(outputs, targets).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("weights", [None, (1.0, 100.0)])
def test_gradient_of_a_record_ignores_the_others(weights):
    """A weighted mean would divide by the batch's weights: one rare record would rescale everybody."""
    task = Classification(classes=TWO, class_weights=weights)
    outputs = torch.randn(4, 2, requires_grad=True)

    def gradient_of_first(targets):
        return torch.autograd.grad(task.losses(outputs, torch.tensor(targets)).sum(), outputs)[0][0]

    assert torch.equal(gradient_of_first([0, 0, 0, 0]), gradient_of_first([0, 0, 0, 1]))


def test_losses_follow_dtype_of_the_outputs():
    task = Classification(classes=TWO, class_weights=(1.0, 2.0))
    assert task.losses(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1])).dtype == torch.float64


def test_probabilities_of_tensor_and_array_agree_and_keep_their_input():
    outputs = torch.randn(6, 3, requires_grad=True)
    array = outputs.detach().numpy().copy()
    task = Classification(classes=THREE)
    np.testing.assert_array_equal(task.probabilities(outputs), task.probabilities(array))
    np.testing.assert_allclose(task.probabilities(array), softmax(array.astype(np.float64), axis=1))
    np.testing.assert_array_equal(array, outputs.detach().numpy())


def test_probabilities_of_extreme_and_broken_outputs():
    task = Classification(classes=TWO)
    rows = task.probabilities(np.array([[1e4, -1e4], [np.nan, 0], [np.inf, 0], [-np.inf, 0]], np.float32))
    np.testing.assert_array_equal(rows[0], [1, 0])
    assert np.isnan(rows[1:]).all()
    assert task.probabilities(np.zeros((0, 2))).shape == (0, 2)


def test_metrics_are_the_classification_metrics():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    targets = np.array([0, 1, 1])
    task = Classification(classes=TWO)
    assert task.metrics(probabilities, targets) == classification_metrics(probabilities, targets)


def test_bounded_sums_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.8, 0.2]])
    sums = Classification(classes=TWO).bounded_sums(
        probabilities, np.array([0, 0, 1, 1]), units=np.array([0, 0, 1, 1])
    )
    assert sums["count"].value == (2.0,)
    assert sums["correct"].value == (1.0,)
    assert sums["targets"].value == (1.0, 1.0)
    assert sums["targets"].labels == TWO
    assert dict(zip(sums["predictions"].labels, sums["predictions"].value, strict=True)) == {
        "true normal": 0.5,
        "true pneumonia": 0.5,
        "false normal": 0.5,
        "false pneumonia": 0.5,
    }
    assert sums["loss"].value[0] == pytest.approx(
        -(np.log(0.9) + np.log(0.4) + np.log(0.7) + np.log(0.2)) / 2
    )


def test_without_units_every_row_has_a_vote():
    probabilities, targets = np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0, 0])
    sums = Classification(classes=TWO).bounded_sums(probabilities, targets)
    assert sums["count"].value == (2.0,)
    assert sums["correct"].value == (1.0,)


@st.composite
def hospitals(draw):
    """Probabilities, broken ones among them, targets and units of a few patients with ragged rows."""
    rows, classes = draw(st.integers(1, 12)), draw(st.integers(2, 4))
    entry = st.one_of(st.floats(0, 1, width=32), st.just(float("nan")))
    probabilities = draw(arrays.arrays(np.float64, (rows, classes), elements=entry))
    targets = draw(arrays.arrays(np.int64, rows, elements=st.integers(0, classes - 1)))
    units = draw(arrays.arrays(np.int64, rows, elements=st.integers(0, 4)))
    return probabilities, targets, units


@settings(deadline=None, max_examples=150)
@given(hospitals())
def test_leaving_of_one_patient_moves_a_sum_by_at_most_its_sensitivity(hospital):
    probabilities, targets, units = hospital
    task = Classification(classes=tuple("abcd"[: probabilities.shape[1]]))
    everybody = task.bounded_sums(probabilities, targets, units=units)
    for unit in np.unique(units):
        stays = units != unit
        without = task.bounded_sums(probabilities[stays], targets[stays], units=units[stays])
        for name, bounded in everybody.items():
            change = np.abs(np.subtract(bounded.value, without[name].value)).sum()
            assert change <= bounded.sensitivity * (1 + 1e-9), name
            assert np.isfinite(bounded.value).all()


def test_stated_sensitivities_are_reached():
    """The bounds are tight, so no noise on them is wasted."""
    task = Classification(classes=TWO)
    nobody = task.bounded_sums(np.zeros((0, 2)), np.zeros(0, np.int64), units=np.zeros(0, np.int64))
    for probabilities in ([[1.0, 0.0]], [[0.0, 1.0]]):
        alone = task.bounded_sums(np.array(probabilities), np.array([0]), units=np.array([0]))
        for name in ("count", "targets", "predictions"):
            change = np.abs(np.subtract(alone[name].value, nobody[name].value)).sum()
            assert change == alone[name].sensitivity
    assert alone["loss"].value == (LOSS_CAP,) == (alone["loss"].sensitivity,)
