"""Several copies of a step's images, each changed at random, averaged in a unit before it is clipped.

Guarantee: the same as without copies. All copies of a unit's images are rows of that unit, so their averaged
gradient is clipped as one and moves the sum by at most C; copies take no noise and no budget. How a copy is
changed follows from random numbers of its own (`client.training.augmentation`), whoever else is there.

Source: De et al., Unlocking High-Accuracy Differentially Private Image Classification through Scale, arXiv
2204.13650, section 3.2 (augmentation multiplicity).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.training.augmentation import Augment
from client.training.batches import input_tensor, target_tensor
from common.examples import Examples
from common.preprocessing import Preprocessing
from common.privacy.randomness import Integers


def copies_of(rows: Integers, segments: Integers, *, each: int) -> tuple[Integers, Integers]:
    """Number `row * each + copy` of `each` copies of every row, (rows * each,), and the segment of each.

    >>> copies_of(np.array([3, 7]), np.array([0, 1]), each=2)
    (array([ 6,  7, 14, 15]), array([0, 0, 1, 1]))
    """
    numbers = rows[:, None] * each + np.arange(each, dtype=np.int64)
    return numbers.ravel(), np.repeat(segments, each)


def loaded(
    examples: Examples,
    preprocessing: Preprocessing,
    device: torch.device,
    augment: Augment | None,
    each: int,
    numbers: NDArray[np.int64],
    filled_to: int,
) -> tuple[Tensor, Tensor]:
    """What a step computes on: `each` copies of every row, changed by `augment`."""
    rows, copies = np.divmod(numbers, each)
    inputs = input_tensor(examples, rows, preprocessing=preprocessing, device=device, filled_to=filled_to)
    if augment is not None:
        inputs = augment(inputs, rows, copies)
    return inputs, target_tensor(examples, rows, device=device, filled_to=filled_to)
