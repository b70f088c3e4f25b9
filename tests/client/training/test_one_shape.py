"""A patient's clipped gradient and score have the same bits whoever else is there, whatever the weights."""

import time

import numpy as np
import pytest
import torch
from torch import nn

import client.training.private as training
from client.evaluation import score_patients
from client.training import copies, row_places
from client.training.batches import filled
from client.training.private import accumulate_clipped_gradients, per_row_gradients, train_privately
from client.training.row_gradients import squared_norms
from client.training.row_places import place_matters
from common.config import DataContract, ModelSpec, PublicPlan, TrainingConfig
from common.models.registry import build_model
from common.preprocessing import Preprocessing
from common.privacy.noise import CLIP_SLACK
from common.privacy.randomness import ReproducibleRandomness
from simulations.audits.chosen_weights import FEW, MORE, SIZE, network_of_attacker, patients
from simulations.audits.released_steps import watched_steps
from tests.client.training.dp_oracle import (
    TASK,
    make_dp_optimizer,
    make_plan,
    random_rows,
    small_network,
    summed,
)

ROWS = 64
PREPROCESSING = Preprocessing(image_size=SIZE, channels=1)


@pytest.fixture(scope="module")
def attacked():
    model, turns = network_of_attacker()
    if not turns:
        pytest.skip("the kernels of this machine treat 15 and 16 rows alike")
    return model


def clipped_sum(model, count):
    with watched_steps() as steps:
        train_privately(
            model=model.train(),
            task=TASK,
            examples=patients(count),
            preprocessing=PREPROCESSING,
            plan=make_plan(sampling_rate=1.0),
            training=TrainingConfig(learning_rate=1e-30),
            round_number=1,
            num_rounds=1,
            randomness=ReproducibleRandomness(0, "here"),
            device=torch.device("cpu"),
        )
    return steps[0].clipped_sum


@pytest.mark.parametrize("few", [1, FEW, 31, 63, 64, 64 + FEW])
def test_one_patient_more_moves_the_sum_by_c_even_with_weights_that_blow_up_rounding(attacked, few):
    moved = np.linalg.norm(clipped_sum(attacked, few + 1) - clipped_sum(attacked, few))
    assert moved <= 1 + CLIP_SLACK


def test_without_filling_up_one_patient_more_would_turn_everybody(attacked, monkeypatch):
    for name in ("input_tensor", "target_tensor"):
        real = getattr(copies, name)
        monkeypatch.setattr(copies, name, lambda *a, filled_to, real=real, **b: real(*a, **b))
    assert np.linalg.norm(clipped_sum(attacked, MORE) - clipped_sum(attacked, FEW)) > 5


@pytest.mark.parametrize("few", [1, FEW, 63, 64, 64 + FEW])
def test_scores_of_the_others_stay_when_a_validation_patient_comes(attacked, few):
    plan = PublicPlan(data=DataContract(image_size=SIZE))
    scores = [
        score_patients(
            attacked,
            TASK,
            patients(count),
            plan=plan,
            device=torch.device("cpu"),
            deadline=time.time() + 600,
        )[0]
        for count in (few, few + 1)
    ]
    assert np.array_equal(scores[0], scores[1][:few])


def contribution(model, inputs, targets, segments):
    """Clipped sum of one chunk that is filled up to ROWS."""
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan())
        accumulate_clipped_gradients(
            wrapped,
            TASK,
            optimizer,
            inputs=filled(inputs, ROWS),
            targets=filled(targets, ROWS),
            segments=torch.tensor(segments),
            num_units=max(segments) + 1,
        )
        optimizer.settle()
        return summed(model)


@pytest.mark.parametrize("name", ["softmax", "cnn1", "cnn2", "cnn", "cnn-small", "cnn-flatten"])
@pytest.mark.parametrize("scale", [1.0, 1e8])
def test_a_patient_of_two_images_adds_the_same_bits_in_any_company_at_any_place(name, scale):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build_model(ModelSpec(name=name, channels=1, image_size=SIZE, num_outputs=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    if place_matters(model, input_shape=(1, SIZE, SIZE), rows=ROWS):
        pytest.skip("the place matters on this machine: patients are computed alone")
    inputs, targets = random_rows(range(ROWS), shape=(1, SIZE, SIZE))
    alone = contribution(model, inputs[:2], targets[:2], [0, 0])
    for others, first in ((14, 14), (62, 0), (62, 29)):
        company = contribution(model, inputs[2 : 2 + others], targets[2 : 2 + others], list(range(others)))
        order = [*range(2, 2 + first), 0, 1, *range(2 + first, 2 + others)]
        segments = [*range(first), first, first, *range(first + 1, others + 1)]
        both = contribution(model, inputs[order], targets[order], segments)
        # One bit of float32 in one number of hers would show a thousandfold in what float64 rounds.
        assert float((both - company - alone).norm()) <= 1e-13 * (others + 1)


def test_squared_norms_have_the_same_bits_for_any_number_of_units():
    for columns in (1, 3, 4096, 70_001):
        gradients = torch.randn(40, columns, generator=torch.Generator().manual_seed(0))
        norms = squared_norms(gradients)
        assert torch.allclose(norms, gradients.double().square().sum(dim=1), rtol=2 * CLIP_SLACK)
        for few in (1, 7, 15, 39):
            assert torch.equal(squared_norms(gradients[:few]), norms[:few])
            assert torch.equal(squared_norms(gradients[few:]), norms[few:])


class PlaceMatters(nn.Linear):
    """A layer whose first row is rounded otherwise than the rest, as kernels may do at an edge."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        return torch.cat([outputs[:1] * (1 + 1e-6), outputs[1:]])


def test_the_trial_sees_a_place_that_matters_and_each_patient_is_then_alone(monkeypatch):
    model = nn.Sequential(nn.Flatten(), PlaceMatters(64, 2))
    assert place_matters(model, input_shape=(1, 8, 8), rows=4, scored_for=TASK)
    assert not place_matters(model, input_shape=(1, 8, 8), rows=1, scored_for=TASK)
    monkeypatch.setattr(row_places, "_gradients", lambda model, inputs, *_: model(inputs))
    assert place_matters(model, input_shape=(1, 8, 8), rows=4)
    monkeypatch.setattr(training, "place_matters", lambda *_, **__: True)
    seen = []
    real = accumulate_clipped_gradients

    def noting(*arguments, inputs, num_units, **others):
        seen.append((len(inputs), num_units))
        real(*arguments, inputs=inputs, num_units=num_units, **others)

    monkeypatch.setattr(training, "accumulate_clipped_gradients", noting)
    attacker, _ = network_of_attacker()
    clipped_sum(attacker, 5)
    assert seen == [(4, 1)] * 5


def test_the_trial_touches_neither_the_model_nor_the_global_generator():
    model, state = small_network(), torch.get_rng_state()
    before = [parameter.clone() for parameter in model.parameters()]
    row_places._FOUND.clear()
    place_matters(model, input_shape=(1, 8, 8), rows=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, model.parameters()))
