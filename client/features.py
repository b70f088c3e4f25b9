"""What a model's fixed stage says of a hospital's images, computed once and kept as long as they are.

A model whose first layers never change (`common.models.fixed_stage`) is trained on their output: hundreds of
rounds of one linear layer take seconds instead of hours. Features are no less private than the images: they
stay in memory and go with the process.

Guarantee: the features of an image have the same bits whatever other images the hospital has, so that a
patient more or less changes nothing of the others. Chunks have one public shape and are filled up with zeros;
random images tell whether the place in a chunk matters, and where it does, each image is computed alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.training.batches import CHUNK_ROWS, input_tensor
from client.training.plain import never, stop_if_asked
from common.config import ModelSpec
from common.examples import Examples
from common.models.fixed_stage import FixedStage, fixed_stage, trained_stage
from common.preprocessing import Preprocessing

MOST_BYTES = 2**30
"""Features of more images than fit are computed anew in each step: slower, with the same result."""
_KEPT: WeakKeyDictionary[Examples, tuple[str, Examples]] = WeakKeyDictionary()
_PLACE_MATTERS: dict[tuple[object, ...], bool] = {}


@dataclass(frozen=True, kw_only=True)
class AsTheyAre(Preprocessing):
    """Nothing is left to do to features."""

    def standardise(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """The same numbers, float32."""
        return np.asarray(images, dtype=np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trainable:
    """What a training round works on: the layers that may train, and what goes into them."""

    model: nn.Module
    examples: Examples
    preprocessing: Preprocessing

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row of the input."""
        return tuple(self.examples.inputs["image"].shape[1:])


def on_features(
    model: nn.Module,
    *,
    spec: ModelSpec,
    examples: Examples,
    preprocessing: Preprocessing,
    device: torch.device,
    changing: bool = False,
    stop: Callable[[], bool] = never,
) -> Trainable:
    """The layers of `model` that train, and the features of the examples.

    Everything as it came where the model has no fixed stage, and where images are `changing` from step to
    step (augmentation), so that no features can be kept. Training the layers trains `model`.
    Raises TrainingStopped between two chunks.
    """
    stage = fixed_stage(model)
    if stage is None or changing or 4 * stage.width * examples.num_rows > MOST_BYTES:
        return Trainable(model=model, examples=examples, preprocessing=preprocessing)
    which = spec.model_dump_json()
    kept = _KEPT.get(examples)
    if kept is None or kept[0] != which:
        stage.to(device)
        features = features_of(stage, examples, preprocessing=preprocessing, device=device, stop=stop)
        kept = (which, replace(examples, inputs={"image": features}))
        _KEPT[examples] = kept
    return Trainable(
        model=trained_stage(model),
        examples=kept[1],
        preprocessing=AsTheyAre(image_size=preprocessing.image_size, channels=preprocessing.channels),
    )


def features_of(
    stage: FixedStage,
    examples: Examples,
    *,
    preprocessing: Preprocessing,
    device: torch.device,
    stop: Callable[[], bool] = never,
) -> NDArray[np.float32]:
    """Features (rows, width) of every image; see the module for the guarantee."""
    features = np.empty((examples.num_rows, stage.width), dtype=np.float32)
    shape = tuple(examples.inputs["image"].shape[1:])
    rows = 1 if _place_matters(stage, shape, device) else CHUNK_ROWS
    with torch.no_grad():
        for start in range(0, examples.num_rows, rows):
            stop_if_asked(stop, step=0, steps=1)
            numbers = np.arange(start, min(start + rows, examples.num_rows), dtype=np.int64)
            inputs = input_tensor(
                examples, numbers, preprocessing=preprocessing, device=device, filled_to=rows
            )
            features[numbers] = stage(inputs)[: len(numbers)].cpu().numpy()
    return features


def _place_matters(stage: FixedStage, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether an image's features depend on its place in a chunk; tried once with random images."""
    key = (repr(stage), shape, str(device), torch.get_num_threads())
    if key not in _PLACE_MATTERS:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((CHUNK_ROWS, *shape), generator=generator).to(device)
        with torch.no_grad():
            expected = stage(images)
            shifted = (stage(images.roll(shift, 0)).roll(-shift, 0) for shift in (1, CHUNK_ROWS // 2 + 1))
            _PLACE_MATTERS[key] = not all(torch.equal(found, expected) for found in shifted)
    return _PLACE_MATTERS[key]
