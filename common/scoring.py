"""What a model says about preprocessed images: the same code in evaluation and in prediction."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.preprocessing import Preprocessing
from common.series import IMAGE, Inputs, model_input, select
from common.tasks import Task

if TYPE_CHECKING:
    from torch import nn

ROWS_AT_ONCE = 256
"""Rows that go through the model together; bounds memory and changes nothing else."""


def image_probabilities(
    model: "nn.Module", task: Task, images: NDArray[np.uint8], *, preprocessing: Preprocessing
) -> NDArray[np.float64]:
    """Probabilities (rows, classes) of uint8 images (rows, channels, size, size) that `preprocessing` made.

    The model is on the CPU and in evaluation mode.
    """
    return input_probabilities(model, task, {IMAGE: images}, preprocessing=preprocessing)


def input_probabilities(
    model: "nn.Module", task: Task, inputs: Inputs, *, preprocessing: Preprocessing
) -> NDArray[np.float64]:
    """Likewise of inputs as in `common.series`: images, or series of them."""
    import torch

    outputs = []
    with torch.inference_mode():
        for start in range(0, len(inputs[IMAGE]), ROWS_AT_ONCE):
            block = select(inputs, slice(start, start + ROWS_AT_ONCE))
            rows = model_input(block, preprocessing=preprocessing)
            outputs.append(model(torch.from_numpy(rows)).numpy())
    if not outputs:
        return np.zeros((0, len(task.classes)))
    return task.probabilities(np.concatenate(outputs))
