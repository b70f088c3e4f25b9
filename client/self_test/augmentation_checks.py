"""Part of the self-test where a plan changes images at random: whether a row stays a row."""

import secrets

import numpy as np
import torch

from client.self_test.setup import PRODUCTION, Setup
from common.preprocessing import Preprocessing
from common.privacy.randomness import ReproducibleRandomness

_ROWS = 8
_FILLED_TO = 16


def coupled_augmentation(setup: Setup) -> str:
    """Why an augmented row depends on others or on its place; "" where it does not, or nothing is changed.

    On random images, one of them not finite: what it touches becomes so too.
    """
    plan, data = setup.plan, setup.plan.data
    augment = PRODUCTION.augment_of_step(
        plan.augmentation,
        Preprocessing.of(plan),
        ReproducibleRandomness(secrets.randbits(31), "self-test"),
        round_number=1,
        step=0,
    )
    if augment is None:
        return ""
    images = torch.randn((_ROWS, data.channels, data.image_size, data.image_size)).to(setup.device)
    images[_ROWS // 2] = float("nan")
    numbers = np.arange(_ROWS, dtype=np.int64)

    def augmented(rows: list[int]) -> torch.Tensor:
        chunk = images.new_zeros((_FILLED_TO, *images.shape[1:]))
        chunk[: len(rows)] = images[rows]
        changed: torch.Tensor = augment(chunk, numbers[rows], numbers[rows] % plan.training.augmentations)
        return changed

    together = augmented(list(range(_ROWS)))
    if together[_ROWS:].any():
        return "augmentation changes rows that are nobody's"
    for row in range(_ROWS):
        if row != _ROWS // 2 and not augmented([row])[0].equal(together[row]):
            return "how an image is augmented depends on what is computed with it"
    return ""
