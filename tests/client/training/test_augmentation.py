"""Copies of images: each row by itself, and a patient's copies averaged before they are clipped as one."""

import numpy as np
import pytest
import torch

from client.training.augmentation import MOST_SHIFT, augmented, copies_of
from client.training.plain import train
from client.training.private import train_privately
from common.config import TrainingConfig
from common.models.registry import read_parameters
from common.preprocessing import Preprocessing
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
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
UNSHIFTED = 0.5


def a_stream(step=0):
    return RANDOMNESS.stream(purpose="augmentation", round_number=1, step=step)


def shifted(image, down, right, mirror):
    """One image the slow way: pixel by pixel."""
    channels, height, width = image.shape
    found = np.empty_like(image)
    for y in range(height):
        for x in range(width):
            x_from = min(max(x - right, 0), width - 1)
            x_from = width - 1 - x_from if mirror else x_from
            found[:, y, x] = image[:, min(max(y - down, 0), height - 1), x_from]
    return found


def test_images_move_and_turn_as_pixel_by_pixel():
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 20, 30), dtype=np.uint8)
    draws = a_stream().uniform((6, 3))
    found = augmented(images, draws=draws)
    for image, draw, changed in zip(images, draws, found, strict=True):
        down, right = (int(draw[axis] * (2 * most + 1)) - most for axis, most in ((0, 2), (1, 3)))
        assert np.array_equal(changed, shifted(image, down, right, draw[2] < 0.5))
    assert found.dtype == np.uint8


def test_middling_draws_change_nothing():
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8), dtype=np.uint8)
    assert np.array_equal(augmented(images, draws=np.full((2, 3), UNSHIFTED)), images)


def test_every_shift_and_both_sides_come_equally_often():
    images = np.arange(28 * 28, dtype=np.int32).reshape(1, 1, 28, 28).repeat(3000, axis=0)
    found = augmented(images, draws=SecureRandomness().stream(
        purpose="augmentation", round_number=1, step=0
    ).uniform((3000, 3)))
    kinds, counts = np.unique(found[:, 0].reshape(3000, -1), axis=0, return_counts=True)
    most = round(MOST_SHIFT * 28)
    assert len(kinds) == 2 * (2 * most + 1) ** 2
    assert counts.min() > 5


def test_a_row_is_changed_by_its_own_draws_alone():
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)
    draws = a_stream().uniform((4, 3))
    together = augmented(images, draws=draws)
    for row in range(4):
        assert np.array_equal(augmented(images[row : row + 1], draws=draws[row : row + 1])[0], together[row])


def test_no_copies_leave_the_rows_alone():
    rows, segments = np.array([4, 2, 7]), np.array([0, 0, 1])
    copies = copies_of(rows, segments, each=0, stream=a_stream())
    assert copies.rows is rows
    assert copies.segments is segments
    assert copies.change_of(copies.numbers) is None


def run(examples, plan, training):
    return train_privately(
        model=small_network(),
        task=TASK,
        examples=examples,
        preprocessing=Preprocessing(image_size=8, channels=1),
        plan=plan,
        training=training,
        round_number=1,
        num_rounds=4,
        randomness=RANDOMNESS,
        device=torch.device("cpu"),
    )


def flat(parameters):
    return torch.cat([torch.from_numpy(array).double().flatten() for array in parameters.values()])


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("physical_batch_size", [1, 7, 256])
def test_a_patients_copies_are_averaged_and_clipped_as_one(clipping, physical_batch_size):
    """Against plain autograd, one patient at a time: copies, mean, norm, factor, noise, step."""
    examples = examples_of([1, 3, 2, 1, 4])
    plan = make_plan(sampling_rate=1.0, l2_clip_norm=0.4, noise_multiplier=0.2, clipping=clipping)
    training = TrainingConfig(
        learning_rate=1.0, augmentations=3, physical_batch_size=physical_batch_size
    )
    found = run(examples, plan, training)
    order = np.concatenate([examples.unit_rows.of(unit) for unit in range(5)])
    images = np.repeat(examples.inputs["image"][order], 3, axis=0)
    draws = a_stream().uniform((len(images), 3))
    images = torch.from_numpy((augmented(images, draws=draws) / 255 - 0.5) / 0.25).float()
    targets = torch.from_numpy(np.repeat(examples.targets[order], 3))
    units = np.repeat(examples.units[order], 3)
    total = oracle_clipped_sum(small_network(), images, targets, units, clip=0.4, clipping=clipping)
    expected = -(total + noise_of_step(small_network(), plan, RANDOMNESS, step=0)) / 20
    moved = flat(found.parameters) - flat(read_parameters(small_network()))
    assert relative_error(moved, expected) < 1e-4


def test_copies_also_enlarge_batches_without_privacy():
    examples = examples_of([1] * 6)

    def moved(augmentations):
        model = small_network()
        arguments = dict(
            task=TASK,
            examples=examples,
            preprocessing=Preprocessing(image_size=8, channels=1),
            local_steps=1,
            round_number=1,
            num_rounds=1,
            randomness=RANDOMNESS,
            device=torch.device("cpu"),
        )
        training = TrainingConfig(learning_rate=1.0, batch_size=6, augmentations=augmentations)
        return flat(train(model=model, training=training, **arguments).parameters)

    model = small_network()
    order = RANDOMNESS.stream(purpose="shuffle", round_number=1, step=0).permutation(6)
    images = np.repeat(examples.inputs["image"][order], 2, axis=0)
    images = augmented(images, draws=a_stream().uniform((12, 3)))
    targets = torch.from_numpy(np.repeat(examples.targets[order], 2))
    loss = TASK.losses(model(torch.from_numpy((images / 255 - 0.5) / 0.25).float()), targets).mean()
    gradient = torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    expected = flat(read_parameters(model)) - gradient
    assert relative_error(moved(2), expected) < 1e-5
    assert relative_error(moved(0), expected) > 1e-5
