"""The network that is exported: from grey values as they lie in a file to probabilities, in one graph."""

import numpy as np
import torch
from torch import Tensor, nn

from client.prediction.stored_model import StoredModel
from common.errors import ModelError
from common.models.plain_scattering import plain_form
from common.preprocessing import Preprocessing
from common.task_kinds import ONE_CLASS_EACH

_HEADS = {"classification": nn.Softmax(dim=1), "multi-label": nn.Sigmoid()}
"""From a task's outputs to its probabilities; the check after writing finds a wrong one."""


class ExportedNetwork(nn.Module):
    """Grey values 0 to 255 (rows, channels, side, side), float32, to probabilities (rows, classes)."""

    scale: Tensor
    offset: Tensor

    def __init__(self, stored: StoredModel) -> None:
        """Raises ModelError for a task or a preprocessing that has no such form."""
        super().__init__()
        if stored.form.is_series:
            raise ModelError(
                "a model of series cannot be exported",
                why="its input is a table of steps that other programs do not know",
                fix="use `flower-client predict`",
            )
        if stored.task.name not in _HEADS:
            raise ModelError(
                f"a model of the task {stored.task.name} cannot be exported",
                why=f"only {' and '.join(_HEADS)} have a form that other programs know",
                fix="use `flower-client predict`",
            )
        scale, offset = scaling(stored.preprocessing)
        self.register_buffer("scale", torch.from_numpy(scale)[:, None, None])
        self.register_buffer("offset", torch.from_numpy(offset)[:, None, None])
        self.network = plain_form(stored.network, image_size=stored.spec.image_size)
        self.head = _HEADS[stored.task.name]
        if stored.task.name in ONE_CLASS_EACH and getattr(stored.task, "loss", "") == "bce":
            self.head = nn.Sequential(nn.LogSigmoid(), self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities; every row alone."""
        probabilities: Tensor = self.head(self.network(images * self.scale + self.offset))
        return probabilities


def scaling(preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """(channels,) factor and summand that `standardise` applies to grey values, float32.

    Found by asking it about every grey value. Raises ModelError where it is no straight line.
    """
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16)
    side, channels = preprocessing.image_size, preprocessing.channels
    tiled = np.tile(greys, (-(-side // 16), -(-side // 16)))[:side, :side]
    images = np.stack([np.roll(tiled, -shift, (0, 1)) for shift in range(0, 16, min(side, 16))])
    rows = np.repeat(images[:, None], channels, axis=1)
    found = preprocessing.standardise(rows)
    factors, summands = [], []
    for channel in range(channels):
        x, y = rows[:, channel].ravel().astype(np.float64), found[:, channel].ravel().astype(np.float64)
        factor, summand = np.polyfit(x, y, 1)
        if np.abs(factor * x + summand - y).max() > 1e-5:
            raise ModelError(
                "this model's preprocessing cannot be exported",
                why="what it does to a grey value depends on the other pixels",
                fix="use `flower-client predict`",
            )
        factors.append(factor)
        summands.append(summand)
    return np.array(factors, np.float32), np.array(summands, np.float32)
