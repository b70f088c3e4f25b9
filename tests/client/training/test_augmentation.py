"""Augmentation: what each setting does, that off is nothing, and that no row meets another."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from client.training.augmentation import Limits, applied, augmented, drawn, row_streams
from client.training.private import train_privately
from common.augmentation import OFF, AugmentationSection
from common.config import TrainingConfig
from common.models.registry import read_parameters
from common.parameters import parameters_sha256
from common.preprocessing import Preprocessing
from common.privacy.noise import CLIP_SLACK
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from simulations.audits.released_steps import watched_steps
from tests.client.training.dp_oracle import TASK, examples_of, make_plan, small_network
from tests.client.training.test_training import run

PREPROCESSING = Preprocessing(image_size=16, channels=1)
LIMITS = Limits.of(PREPROCESSING)
RANDOMNESS = ReproducibleRandomness(3, "here")
ALL = AugmentationSection(
    flip="both", rotate=20, shift=0.1, scale=0.2, elastic=0.03, brightness=0.1, contrast=0.2, noise=0.05
)
ROUND = {"round_number": 1, "num_rounds": 2}


def standardised(rows=5, size=16, channels=1, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, channels, size, size), dtype=np.uint8)
    return torch.from_numpy(PREPROCESSING.standardise(pixels))


def streams(rows, step=0, randomness=RANDOMNESS):
    return row_streams(randomness, np.asarray(rows, np.int64), round_number=1, step=step)


def planted(row, column, *, size=16):
    images = torch.full((1, 1, size, size), -2.0)
    images[0, 0, row, column] = 2.0
    return images


def one_draw(section, values, size=16):
    """What a stream that says these eight numbers leads to."""

    class Chosen:
        def uniform(self, size):
            return np.asarray(values, float)

        def normal(self, size):
            return np.zeros(size)

    return drawn(section, [Chosen()], shape=(1, 1, size, size))


def brightest(images):
    return divmod(int(images[0, 0].argmax()), images.shape[-1])


def test_off_is_nothing_at_all():
    images = standardised()
    assert not OFF.is_on
    assert augmented(images, OFF, streams(range(5)), limits=LIMITS) is images


def test_training_with_all_off_has_the_bits_of_training_without():
    examples, training = examples_of([2, 1, 3, 1]), TrainingConfig(learning_rate=0.1)
    hashes = {
        parameters_sha256(run(small_network(), examples, training, **more).parameters)
        for more in ({}, {"augmentation": OFF}, {"augmentation": AugmentationSection(elastic_points=7)})
    }
    assert len(hashes) == 1
    changed = run(small_network(), examples, training, augmentation=AugmentationSection(noise=0.1))
    assert parameters_sha256(changed.parameters) not in hashes


@pytest.mark.parametrize(("flip", "axes"), [("horizontal", (-1,)), ("vertical", (-2,)), ("both", (-1, -2))])
def test_flipping_mirrors_exactly_and_twice_is_identity(flip, axes):
    section, images = AugmentationSection(flip=flip), standardised(rows=1)
    draws = one_draw(section, [0.1, 0.1, *[0.5] * 6])
    once = applied(images, draws, limits=LIMITS)
    assert once.equal(images.flip(axes))
    assert applied(once, draws, limits=LIMITS).equal(images)
    kept = one_draw(section, [0.9, 0.9, *[0.5] * 6])
    assert applied(images, kept, limits=LIMITS).equal(images)


def test_about_half_of_the_rows_are_flipped():
    draws = drawn(AugmentationSection(flip="both"), streams(range(1000)), shape=(1000, 1, 2, 2))
    assert 420 < int(draws.mirrored.sum()) < 580
    assert 420 < int(draws.overturned.sum()) < 580
    assert 180 < int((draws.mirrored & draws.overturned).sum()) < 320


def test_a_shift_moves_the_planted_spot():
    section = AugmentationSection(shift=0.25)
    right_and_up = one_draw(section, [0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 0.5, 0.5])
    moved = applied(planted(8, 6), right_and_up, limits=LIMITS)
    assert brightest(moved) == (4, 10)
    assert moved.max() == pytest.approx(2.0, abs=1e-5)


def test_a_turn_of_a_quarter_turns_clockwise():
    draws = one_draw(AugmentationSection(rotate=90), [0.5, 0.5, 1.0, *[0.5] * 5])
    images = standardised(rows=1)
    assert torch.allclose(applied(images, draws, limits=LIMITS), images.rot90(-1, (2, 3)), atol=1e-4)


def test_a_scale_enlarges_around_the_middle():
    draws = one_draw(AugmentationSection(scale=0.5), [0.5, 0.5, 0.5, 1.0, *[0.5] * 4])
    images = torch.full((1, 1, 16, 16), -2.0)
    images[0, 0, 6:10, 6:10] = 2.0
    found = applied(images, draws, limits=LIMITS)
    assert 30 <= int((found > 0).sum()) <= 42  # 4 x 4 becomes 6 x 6


def test_brightness_and_contrast_are_as_stated_and_end_at_black_and_white():
    section = AugmentationSection(brightness=0.5, contrast=0.5)
    images = standardised(rows=1)
    brighter = applied(images, one_draw(section, [0.5] * 6 + [1.0, 0.5]), limits=LIMITS)
    assert torch.allclose(brighter, (images + 2).clamp(-2, 2))
    flatter = applied(images, one_draw(section, [0.5] * 7 + [0.0]), limits=LIMITS)
    assert torch.allclose(flatter, images / 2)


def test_noise_has_the_stated_spread():
    section, grey = AugmentationSection(noise=0.1), torch.zeros(200, 1, 16, 16)
    found = augmented(grey, section, streams(range(200)), limits=LIMITS)
    assert float(found.std()) == pytest.approx(0.4, rel=0.02)
    assert float(found.mean()) == pytest.approx(0.0, abs=0.01)


def test_bending_moves_points_about_as_far_as_stated():
    section = AugmentationSection(elastic=0.03)
    ramp = torch.linspace(-2, 2, 64).expand(50, 1, 64, 64).contiguous()
    found = augmented(ramp, section, streams(range(50)), limits=LIMITS)
    moved = (found - ramp)[:, :, 16:48, 16:48] / 4  # along the ramp, as a share of the side
    assert 0.01 < float(moved.std()) < 0.06
    assert not found[0].equal(found[1])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=9, unique=True), st.integers(0, 5))
def test_a_row_gets_the_same_bits_in_any_company_and_place(rows, step):
    size, filled_to = 20, 16
    table = standardised(rows=32, size=size)

    def images_of(numbers):
        images = torch.zeros(filled_to, 1, size, size)
        images[: len(numbers)] = table[[number % 32 for number in numbers]]
        return images

    together = augmented(images_of(rows), ALL, streams(rows, step), limits=LIMITS)
    turned = rows[::-1]
    reverse = augmented(images_of(turned), ALL, streams(turned, step), limits=LIMITS)
    for place, row in enumerate(rows):
        alone = augmented(images_of([row]), ALL, streams([row], step), limits=LIMITS)
        assert alone[0].equal(together[place])
        assert alone[0].equal(reverse[len(rows) - 1 - place])
    assert not together[len(rows) :].any(), "rows that fill up stay zeros"
    assert float(together.min()) >= -2
    assert float(together.max()) <= 2


def test_a_broken_row_reaches_no_other():
    images = standardised(rows=3)
    whole = augmented(images, ALL, streams(range(3)), limits=LIMITS)
    images = images.clone()
    images[1] = float("nan")
    assert augmented(images, ALL, streams(range(3)), limits=LIMITS)[[0, 2]].equal(whole[[0, 2]])


def test_steps_rows_and_views_differ_and_secure_streams_never_repeat():
    images = standardised(rows=1).expand(2, -1, -1, -1).contiguous()
    found = augmented(images, ALL, streams([0, 1]), limits=LIMITS)
    assert not found[0].equal(found[1])
    other_view = row_streams(RANDOMNESS, np.array([0]), round_number=1, step=0, views=np.array([1]))
    assert not augmented(images, ALL, other_view, limits=LIMITS)[0].equal(found[0])
    assert not augmented(images, ALL, streams([0], step=1), limits=LIMITS)[0].equal(found[0])
    secure = [augmented(images, ALL, streams([0], randomness=SecureRandomness()), limits=LIMITS)]
    secure += [augmented(images, ALL, streams([0], randomness=SecureRandomness()), limits=LIMITS)]
    assert not secure[0].equal(secure[1])


def test_times_of_a_series_move_alike_and_colours_too():
    section = AugmentationSection(flip="both", rotate=30, shift=0.2, scale=0.2, elastic=0.02)
    limits = Limits.of(Preprocessing(image_size=16, channels=3))
    frames = standardised(rows=2, channels=3)[:, None].expand(-1, 4, -1, -1, -1).contiguous()
    found = augmented(frames, section, streams([0, 1]), limits=limits)
    assert found.shape == frames.shape
    for time in range(1, 4):
        assert found[:, time].equal(found[:, 0])
    assert found[:, 0].equal(augmented(frames[:, 0].clone(), section, streams([0, 1]), limits=limits))


@pytest.mark.parametrize("wrong", [{"rotate": 181}, {"noise": -0.1}, {"flip": "sideways"}, {"elastic": 0.5}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        AugmentationSection(**wrong)


def test_features_cannot_be_augmented():
    with pytest.raises(ValueError, match="cannot augment"):
        augmented(torch.zeros(3, 7), ALL, streams([0]), limits=LIMITS)


def trained(examples, randomness, *, augmentation=ALL, rate=0.1):
    with watched_steps() as steps:
        result = train_privately(
            model=small_network(),
            task=TASK,
            examples=examples,
            preprocessing=Preprocessing(image_size=8, channels=1),
            plan=make_plan(sampling_rate=1.0, steps=2),
            training=TrainingConfig(learning_rate=rate),
            randomness=randomness,
            device=torch.device("cpu"),
            augmentation=augmentation,
            **ROUND,
        )
    return result, steps


def test_one_patient_more_moves_the_sum_by_at_most_c_under_augmentation():
    many = examples_of([2, 1, 3, 1, 2, 1])
    order = np.argsort(many.units, kind="stable")
    many = type(many)(
        inputs={"image": many.inputs["image"][order]},
        targets=many.targets[order],
        units=many.units[order],
        unit_ids=many.unit_ids,
    )
    few = many.select_units(range(5))
    sums = [trained(those, RANDOMNESS, rate=1e-30)[1] for those in (few, many)]
    for step in range(2):
        moved = np.linalg.norm(sums[1][step].clipped_sum - sums[0][step].clipped_sum)
        assert 0 < moved <= 1 + CLIP_SLACK
    alone = [trained(few, RANDOMNESS, rate=1e-30)[1][step].clipped_sum for step in range(2)]
    assert np.array_equal(alone[0], sums[0][0].clipped_sum), "the same randomness gives the same bits"
    assert np.linalg.norm(alone[1] - alone[0]) > 1e-3, "each step has augmentations of its own"


def test_reproducible_private_training_repeats_itself_bit_by_bit():
    examples = examples_of([2, 1, 3, 1])
    hashes = {parameters_sha256(trained(examples, RANDOMNESS)[0].parameters) for _ in range(2)}
    assert len(hashes) == 1
    plain, _ = trained(examples, RANDOMNESS, augmentation=OFF)
    assert parameters_sha256(plain.parameters) not in hashes
    assert set(plain.parameters) == set(read_parameters(small_network()))
