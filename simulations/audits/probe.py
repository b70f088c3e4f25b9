"""Hospitals made for audits: patients who do not exist, and a network in which each one can be seen.

The network is linear without bias and starts at zero, so black films have no gradient, and a film with one
lit pixel moves the two weights of that pixel and nothing else, by the clip C. What a round releases can then
be read off the change of its weights alone, as anybody who receives the update could.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import client.round
import client.training.private
from common.augmentation import OFF, AugmentationSection
from common.config import TrainingConfig
from common.examples import Examples
from common.models.registry import read_parameters
from common.preprocessing import Preprocessing
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import RandomnessSource
from common.tasks import Classification, Task

TASK = Classification(classes=("negative", "positive"))
CLIP = 0.05
"""Far below the gradient norm of a lit pixel (0.7): the clip is what holds it."""
STILL = 1e-6
"""A step size that leaves a network where it is: every step of a round then is the same experiment."""
HARDLY_ANY_NOISE = 1e-6
TURNED = AugmentationSection(flip="both", shift=0.1)
"""What several copies of an image are changed by."""


class FromBlack(Preprocessing):
    """Black is 0, so that a dark pixel has no gradient."""

    def standardise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 to 0..1."""
        return images.astype(np.float32) / np.float32(255)


def make_plan(**changes: Any) -> PrivacyPlan:
    """A plan of one step that everybody enters, with `changes`."""
    numbers: dict[str, Any] = dict(
        sampling_rate=1.0,
        l2_clip_norm=CLIP,
        noise_multiplier=HARDLY_ANY_NOISE,
        steps=1,
        enrolled_units=20,
        max_rows_per_unit=4,
        unit="patient",
    )
    return PrivacyPlan(**(numbers | changes))


def blank_network(side: int) -> nn.Module:
    """Two outputs, linear in the pixels, all weights zero."""
    layer = nn.Linear(side * side, 2, bias=False)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(nn.Flatten(), layer)


def table(
    images: NDArray[np.uint8], targets: NDArray[np.int64], units: NDArray[np.int64] | None = None
) -> Examples:
    """Films (rows, 1, side, side) of patients 0, 1, ...; one each unless `units` says whose they are."""
    units = np.arange(len(images), dtype=np.int64) if units is None else units
    return Examples(
        inputs={"image": images},
        targets=targets.astype(np.int64),
        units=units.astype(np.int64),
        unit_ids=tuple(str(number) for number in range(int(units.max(initial=-1)) + 1)),
    )


def lit_films(lit: Sequence[int] | NDArray[np.int64], side: int) -> Examples:
    """One patient of class 0 for each entry: a black film with that pixel lit."""
    images = np.zeros((len(lit), 1, side, side), dtype=np.uint8)
    images.reshape(len(lit), -1)[np.arange(len(lit)), np.asarray(lit, dtype=np.int64)] = 255
    return table(images, np.zeros(len(lit), dtype=np.int64))


def black_films(count: int, side: int) -> Examples:
    """`count` patients without a gradient in the blank network."""
    return table(np.zeros((count, 1, side, side), dtype=np.uint8), np.zeros(count, dtype=np.int64))


def production_randomness() -> RandomnessSource:
    """What a hospital's round draws from, as it is now."""
    module: Any = client.round
    source: RandomnessSource = module.SecureRandomness()
    return source


def noisy_sums(
    *,
    model: nn.Module,
    examples: Examples,
    plan: PrivacyPlan,
    learning_rate: float = STILL,
    preprocessing: Preprocessing | None = None,
    task: Task = TASK,
    round_number: int = 1,
    physical_batch_size: int = 256,
    augmentations: int = 1,
    randomness: RandomnessSource | None = None,
) -> NDArray[np.float64]:
    """Sum over a round's steps of what each released, times q n: read from the change of the weights alone.

    Runs `train_privately` as it is now, with the randomness that a hospital's round takes. Exact up to
    float32 where the weights start at zero or the learning rate is large.
    """
    size = examples.inputs["image"].shape[-1]
    before = _flat(read_parameters(model))
    result = client.training.private.train_privately(
        model=model,
        task=task,
        examples=examples,
        preprocessing=preprocessing or FromBlack(image_size=size, channels=1),
        augmentation=TURNED if augmentations > 1 else OFF,
        plan=plan,
        training=TrainingConfig(
            learning_rate=learning_rate, physical_batch_size=physical_batch_size, augmentations=augmentations
        ),
        round_number=round_number,
        num_rounds=max(round_number, 1),
        randomness=randomness or production_randomness(),
        device=torch.device("cpu"),
    )
    change = _flat(result.parameters) - before
    # Not plan.expected_batch_size: the audit goes by the plan's published numbers, not by code it audits.
    return -change * (plan.sampling_rate * plan.enrolled_units) / learning_rate


def along_lit_pixels(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """(pixels,): a blank network's sums in the direction of each pixel's patient, in units of C."""
    negative, positive = sums.reshape(2, -1)
    return np.asarray((positive - negative) / np.sqrt(2) / CLIP)


@contextmanager
def same_global_seeds(seed: int = 0) -> Iterator[None]:
    """Seed every global generator alike inside, as a run with a shared seed would; restored afterwards."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def _flat(parameters: Any) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(value, dtype=np.float64).ravel() for value in parameters.values()])
