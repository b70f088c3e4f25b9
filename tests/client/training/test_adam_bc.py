"""DP-AdamBC against a sequence computed by hand, and the optimisers that the guard knows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import RMSprop

from client.training.adam_bc import AdamBC, noise_variance
from client.training.guard import guard_optimizer
from client.training.patient_optimizer import PatientDPOptimizer
from client.training.plain import make_optimizer
from client.training.private import per_row_gradients, train_privately
from common.config import TrainingConfig
from common.errors import ConfigError, GuardError
from common.preprocessing import Preprocessing
from common.privacy.randomness import ReproducibleRandomness
from tests.client.training.dp_oracle import TASK, examples_of, make_plan, small_network

GRADIENTS = (0.5, -0.2, 0.01, 0.01)


def steps_of(optimizer, parameter, gradients):
    """Values of the parameter after each step."""
    values = []
    for gradient in gradients:
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        values.append(parameter.item())
    return values


def test_steps_are_those_computed_by_hand():
    """m, v, Phi = 0.04, floor = 0.01; the last two steps are below the floor."""
    weight, mean, square, expected = 1.0, 0.0, 0.0, []
    for step, gradient in enumerate(GRADIENTS, start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        corrected = max(square / (1 - 0.999**step) - 0.04, 0.01)
        weight -= 0.1 * mean / (1 - 0.9**step) / math.sqrt(corrected)
        expected.append(weight)
    # The first by hand altogether: 1 - 0.1 * 0.5 / sqrt(0.25 - 0.04).
    assert expected[0] == pytest.approx(1 - 0.05 / math.sqrt(0.21))
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdamBC([parameter], lr=0.1, noise_variance=0.04, floor=0.01)
    assert steps_of(optimizer, parameter, GRADIENTS) == pytest.approx(expected, rel=1e-12)


def test_without_noise_it_is_adam():
    ours, theirs = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    bc = AdamBC([ours], lr=0.1, noise_variance=0.0, floor=1e-16)
    adam = torch.optim.Adam([theirs], lr=0.1, eps=0.0)
    assert steps_of(bc, ours, GRADIENTS) == pytest.approx(steps_of(adam, theirs, GRADIENTS), rel=1e-9)


def test_the_bias_of_the_noise_is_taken_off():
    """Gradients of 0.1 under noise ten times as large: Adam's second moment is the noise's, ours is not."""
    noise, random = 1.0, np.random.default_rng(0)
    parameter = nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    optimizer = AdamBC([parameter], lr=1e-9, noise_variance=noise**2, floor=1e-8)
    for _ in range(3):
        parameter.grad = torch.from_numpy(0.1 + noise * random.standard_normal(20_000))
        optimizer.step()
    moment = (optimizer.state[parameter]["square"] / (1 - 0.999**3)).mean().item()
    assert moment == pytest.approx(0.01 + noise**2, rel=0.03)
    assert abs(moment - noise**2) < 0.03


def test_noise_is_that_of_the_plan():
    plan = make_plan()
    expected = (plan.noise_multiplier * plan.l2_clip_norm / plan.expected_batch_size) ** 2
    assert noise_variance(plan) == pytest.approx(expected)
    training = TrainingConfig(optimizer="adam-bc", adam_bc_floor=0.25)
    optimizer = make_optimizer([nn.Parameter(torch.ones(1))], training, learning_rate=0.5, privacy=plan)
    assert optimizer.param_groups[0]["noise_variance"] == noise_variance(plan)
    assert optimizer.param_groups[0]["floor"] == 0.25
    with pytest.raises(ConfigError, match="noise of a private run"):
        make_optimizer([nn.Parameter(torch.ones(1))], training, learning_rate=0.5)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, -1, 1), (1, 1, 0), (math.nan, 1, 1)])
def test_impossible_numbers_are_refused(numbers):
    rate, noise, floor = numbers
    with pytest.raises(ValueError, match="cannot be used"):
        AdamBC([nn.Parameter(torch.ones(1))], lr=rate, noise_variance=noise, floor=floor)


def guarded(optimizer_of):
    plan, model = make_plan(), small_network()
    with per_row_gradients(model) as wrapped:
        parameters = list(model.parameters())
        randomness = ReproducibleRandomness(0, "here")
        inner = optimizer_of(parameters, plan)
        optimizer = PatientDPOptimizer(inner, plan=plan, randomness=randomness, round_number=1)
        guard_optimizer(optimizer, wrapped, plan)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "adam-bc"])
def test_the_guard_knows_every_optimiser_of_the_configuration(name):
    training = TrainingConfig(optimizer=name)
    guarded(lambda parameters, plan: make_optimizer(parameters, training, learning_rate=0.1, privacy=plan))


def test_the_guard_refuses_other_noise_and_other_optimisers():
    other = TrainingConfig(optimizer="adam-bc")
    with pytest.raises(GuardError, match="other noise than the plan's"):
        guarded(
            lambda parameters, plan: make_optimizer(
                parameters, other, learning_rate=0.1, privacy=replace(plan, noise_multiplier=9.0)
            )
        )
    with pytest.raises(GuardError, match="not plain SGD"):
        guarded(lambda parameters, plan: RMSprop(parameters, lr=0.1, weight_decay=0.1))
    with pytest.raises(GuardError, match="not plain SGD"):
        guarded(lambda parameters, plan: torch.optim.Adagrad(parameters, lr=0.1))


@pytest.mark.parametrize("name", ["rmsprop", "adam-bc"])
def test_a_private_round_runs_and_repeats_bit_by_bit(name):
    def run():
        return train_privately(
            model=small_network(),
            task=TASK,
            examples=examples_of([1, 2, 1, 3]),
            preprocessing=Preprocessing(image_size=8, channels=1),
            plan=make_plan(),
            training=TrainingConfig(optimizer=name, learning_rate=0.01),
            round_number=1,
            num_rounds=2,
            randomness=ReproducibleRandomness(7, "here"),
            device=torch.device("cpu"),
        )

    first, second = run().parameters, run().parameters
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert all(np.isfinite(array).all() for array in first.values())
