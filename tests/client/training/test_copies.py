"""Copies of images: a patient's copies are averaged before they are clipped as one."""

import numpy as np
import pytest
import torch

from client.training.augmentation import augment_of_step
from client.training.copies import copies_of
from client.training.plain import train
from client.training.private import train_privately
from common.augmentation import AugmentationSection
from common.config import FederationConfig, TrainingConfig
from common.models.registry import read_parameters
from common.preprocessing import Preprocessing
from common.privacy.randomness import ReproducibleRandomness
from tests.client.training.dp_oracle import (
    TASK,
    examples_of,
    make_plan,
    noise_of_step,
    oracle_clipped_sum,
    relative_error,
    small_network,
)

RANDOMNESS = ReproducibleRandomness(7, "here")
PREPROCESSING = Preprocessing(image_size=8, channels=1)
CHANGED = AugmentationSection(flip="both", shift=0.2, contrast=0.3)
CPU = torch.device("cpu")


def flat(parameters):
    return torch.cat([torch.from_numpy(array).double().flatten() for array in parameters.values()])


def changed_rows(examples, rows, each):
    """`each` changed images of every row, one row after the other, and their targets."""
    augment = augment_of_step(CHANGED, PREPROCESSING, RANDOMNESS, round_number=1, step=0)
    images = torch.from_numpy(PREPROCESSING.standardise(examples.inputs["image"][rows]))
    images = torch.cat(
        [
            augment(image[None], rows[[place]], np.array([c]))
            for place, image in enumerate(images)
            for c in range(each)
        ]
    )
    return images, torch.from_numpy(np.repeat(examples.targets[rows], each))


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("physical_batch_size", [1, 7, 256])
def test_a_patients_copies_are_averaged_and_clipped_as_one(clipping, physical_batch_size):
    """Against plain autograd, one patient at a time: copies, mean, norm, factor, noise, step."""
    examples, each = examples_of([1, 3, 2, 1, 4]), 3
    plan = make_plan(sampling_rate=1.0, l2_clip_norm=0.4, noise_multiplier=0.2, clipping=clipping)
    model = small_network()
    found = train_privately(
        model=model,
        task=TASK,
        examples=examples,
        preprocessing=PREPROCESSING,
        augmentation=CHANGED,
        plan=plan,
        training=TrainingConfig(
            learning_rate=1.0, augmentations=each, physical_batch_size=physical_batch_size
        ),
        round_number=1,
        num_rounds=4,
        randomness=RANDOMNESS,
        device=CPU,
    )
    rows = np.concatenate([examples.unit_rows.of(unit) for unit in range(examples.num_units)])
    images, targets = changed_rows(examples, rows, each)
    units = np.repeat(examples.units[rows], each)
    total = oracle_clipped_sum(small_network(), images, targets, units, clip=0.4, clipping=clipping)
    expected = -(total + noise_of_step(small_network(), plan, RANDOMNESS, step=0)) / 20
    moved = flat(found.parameters) - flat(read_parameters(small_network()))
    assert relative_error(moved, expected) < 1e-4


def test_a_single_copy_is_the_row_itself():
    rows, segments = np.array([4, 2, 7]), np.array([0, 0, 1])
    assert [part.tolist() for part in copies_of(rows, segments, each=1)] == [rows.tolist(), segments.tolist()]
    assert [part.tolist() for part in copies_of(rows[:0], segments[:0], each=3)] == [[], []]


def test_without_privacy_a_batch_has_all_copies():
    examples, model = examples_of([1] * 6), small_network()
    found = train(
        model=model,
        task=TASK,
        examples=examples,
        preprocessing=PREPROCESSING,
        augmentation=CHANGED,
        training=TrainingConfig(learning_rate=1.0, batch_size=6, augmentations=2, physical_batch_size=5),
        local_steps=1,
        round_number=1,
        num_rounds=1,
        randomness=RANDOMNESS,
        device=CPU,
    )
    model = small_network()
    images, targets = changed_rows(examples, np.arange(6), 2)
    loss = TASK.losses(model(images), targets).mean()
    gradient = torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    before = flat(read_parameters(model))
    assert relative_error(flat(found.parameters) - before, -gradient) < 1e-5


def test_copies_that_would_be_the_same_are_refused():
    with pytest.raises(ValueError, match="augmentation"):
        FederationConfig(training=TrainingConfig(augmentations=4))
    FederationConfig(training=TrainingConfig(augmentations=4), augmentation=AugmentationSection(shift=0.1))
