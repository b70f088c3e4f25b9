"""From examples to the array that a model of series takes."""

import numpy as np
import pytest

from common.config import DataContract, FederationConfig
from common.errors import ConfigError
from common.preprocessing import Preprocessing
from common.series import lengths, model_input, row_shape, select
from common.series_form import form_named
from common.settings import parse

PREPARED = Preprocessing(image_size=8, channels=3)


def series(rows=3, steps=4, seed=0):
    random = np.random.default_rng(seed)
    long = random.integers(1, steps + 1, rows)
    present = (np.arange(steps) < long[:, None]).astype(np.float32)
    return {
        "image": random.integers(0, 256, (rows, steps, 3, 8, 8), dtype=np.uint8),
        "present": present,
        "years": random.random((rows, steps)).astype(np.float32),
    }


def test_a_step_is_its_picture_then_present_then_years():
    inputs = series()
    made = model_input(inputs, preprocessing=PREPARED)
    assert made.dtype == np.float32
    assert made.shape == (3, *row_shape(inputs)) == (3, 4, 3 * 64 + 2)
    for row in range(3):
        for step in range(4):
            if inputs["present"][row, step]:
                picture = PREPARED.standardise(inputs["image"][row, step][None])[0]
                assert np.array_equal(made[row, step, :-2], picture.ravel())
                assert made[row, step, -2:].tolist() == [1, inputs["years"][row, step]]
            else:
                assert not made[row, step].any()
    assert lengths(inputs).tolist() == inputs["present"].sum(1).tolist()


def test_padding_says_nothing_whatever_it_holds():
    inputs = series()
    other = {name: values.copy() for name, values in inputs.items()}
    other["image"][inputs["present"] == 0] = 7
    other["years"][inputs["present"] == 0] = np.nan
    assert np.array_equal(
        model_input(inputs, preprocessing=PREPARED), model_input(other, preprocessing=PREPARED)
    )


def test_single_images_are_as_ever():
    images = np.random.default_rng(1).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    assert np.array_equal(
        model_input({"image": images}, preprocessing=PREPARED), PREPARED.standardise(images)
    )
    assert row_shape({"image": images}) == (3, 8, 8)
    assert select({"image": images}, slice(1, 3))["image"].base is not None  # a view, no copy


def test_a_batch_without_rows_has_the_shape_of_others():
    empty = select(series(), slice(0, 0))
    assert model_input(empty, preprocessing=PREPARED).shape == (0, 4, 194)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"steps": 4}, "needs series"),
        ({"series": "visits"}, "needs steps"),
        ({"task": "progression"}, "needs series = 'visits'"),
        ({"task": "progression", "series": "slices", "steps": 4}, "needs series = 'visits'"),
        ({"series": "visits", "steps": 65}, "64"),
    ],
)
def test_plans_that_make_no_sense_are_refused(data, said):
    with pytest.raises(ConfigError, match=said):
        parse(FederationConfig, {"data": data}, source="test")


def test_the_plan_says_the_shape_of_the_input_and_the_steps_of_the_model():
    config = parse(
        FederationConfig, {"data": {"series": "visits", "steps": 4, "image-size": 8}}, source="test"
    )
    assert config.data.input_shape == (4, 66)
    assert config.model_spec.steps == 4
    assert DataContract().input_shape == (1, 28, 28)
    assert FederationConfig().model_spec.steps == 1
    assert form_named("slices", 4).words == "up to 4 slices of a volume"
    with pytest.raises(ConfigError, match="no series"):
        form_named("movie", 4)
