"""Server optimisers against formulas written out number by number in Python floats."""

import math

import numpy as np
import pytest

from common.server_settings import ServerSection
from server.server_optimizer import OptimizerState, moving_average, next_weights

ROUNDS = 6


def f32(value: float) -> float:
    return float(np.float32(value))


def slow(settings: ServerSection, start: float, updates: list[float]) -> float:
    """One coordinate over all rounds, straight from the papers."""
    w, m, v = start, 0.0, f32(1e-3**2)
    eta, beta = settings.learning_rate, settings.momentum
    for d in updates:
        if settings.optimizer == "plain":
            w = f32(w + eta * d)
        elif settings.optimizer == "momentum":
            m = f32(beta * m + d)
            w = f32(w + eta * m)
        else:
            m = f32(beta * m + (1 - beta) * d)
            v = f32(0.99 * v + (1 - 0.99) * d * d)
            w = f32(w + eta * m / (math.sqrt(v) + 1e-3))
    return w


@pytest.mark.parametrize("optimizer", ["plain", "momentum", "adam"])
def test_each_coordinate_moves_as_the_papers_say(optimizer):
    settings = ServerSection(optimizer=optimizer, learning_rate=0.7, momentum=0.6)
    random = np.random.default_rng(1)
    start = {
        "a": random.normal(size=(3, 2)).astype(np.float32),
        "b": random.normal(size=4).astype(np.float32),
    }
    updates = [
        {name: (0.1 * random.normal(size=array.shape)).astype(np.float32) for name, array in start.items()}
        for _ in range(ROUNDS)
    ]
    weights, state = start, OptimizerState()
    for update in updates:
        weights, state = next_weights(weights, update, state, settings)
    for name, array in start.items():
        for position, value in enumerate(array.ravel()):
            series = [float(update[name].ravel()[position]) for update in updates]
            assert weights[name].ravel()[position] == slow(settings, float(value), series)
        assert weights[name].dtype == np.float32


def test_plain_with_step_one_is_fedavg_and_the_arithmetic_is_float64():
    weights, update = {"w": np.array([1e8], np.float32)}, {"w": np.array([3.0], np.float32)}
    moved, _ = next_weights(weights, update, OptimizerState(), ServerSection(learning_rate=1 + 1e-12))
    assert moved["w"][0] == np.float32(1e8 + 3.0)


def test_inputs_are_left_as_they_were():
    weights, update = {"w": np.ones(2, np.float32)}, {"w": np.ones(2, np.float32)}
    state = OptimizerState()
    next_weights(weights, update, state, ServerSection(optimizer="adam"))
    assert weights["w"].tolist() == update["w"].tolist() == [1.0, 1.0]
    assert state == OptimizerState()


def test_the_moving_average_forgets_its_start_and_follows_the_decay():
    average, initial = {"w": np.array([1e3], np.float32)}, 1.0
    for round_number in range(1, 31):
        average = moving_average(average, {"w": np.ones(1, np.float32)}, decay=0.9, round_number=round_number)
        initial *= min(0.9, (1 + round_number) / (10 + round_number))
    assert average["w"][0] == pytest.approx(1 + 999 * initial, rel=1e-6)
    assert initial < 1e-7


@pytest.mark.parametrize("optimizer", ["plain", "momentum", "adam"])
def test_the_new_weights_may_take_the_place_of_the_update(optimizer):
    settings = ServerSection(optimizer=optimizer, learning_rate=0.7, momentum=0.6)
    random = np.random.default_rng(2)

    def some():
        shapes = {"a": (300, 400), "b": (), "c": (7,)}
        return {
            name: np.asarray(random.normal(size=shape), dtype=np.float32) for name, shape in shapes.items()
        }

    weights, before = some(), some()
    state = OptimizerState() if optimizer == "plain" else OptimizerState(first_moment=some())
    expected, after = next_weights(weights, before, state, settings)
    update = {name: array.copy() for name, array in before.items()}
    moved, in_place = next_weights(weights, update, state, settings, out=update)
    for name in weights:
        assert moved[name] is update[name]
        assert moved[name].tobytes() == expected[name].tobytes()
        assert moved[name].shape == weights[name].shape
        if optimizer != "plain":
            assert in_place.first_moment[name].tobytes() == after.first_moment[name].tobytes()
