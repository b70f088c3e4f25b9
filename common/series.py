"""From examples to the one array that a model takes: pictures, or series of pictures in order.

A series is one float32 row (steps, features): the flattened preprocessed picture, then `present` (1 for a
real step, 0 for padding; real steps first), then `years` since the step before (0 for the first). Padding is
all zeros, so a row says nothing that is not there.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.preprocessing import Preprocessing
from common.series_form import TIME_FEATURES

IMAGE: Final = "image"
PRESENT: Final = "present"
YEARS: Final = "years"
Inputs = Mapping[str, NDArray[Any]]
"""Named inputs of `common.examples.Examples`; of series `image` is uint8 (rows, steps, channels, height,
width), `present` and `years` are float32 (rows, steps)."""


def is_series(inputs: Inputs) -> bool:
    """Whether the rows are series."""
    return PRESENT in inputs


def row_shape(inputs: Inputs) -> tuple[int, ...]:
    """Shape of one row of what `model_input` makes."""
    shape = tuple(inputs[IMAGE].shape[1:])
    return (shape[0], prod(shape[1:]) + TIME_FEATURES) if is_series(inputs) else shape


def select(inputs: Inputs, rows: Any) -> dict[str, NDArray[Any]]:
    """These rows of every input; `rows` is a slice or numbers."""
    return {name: values[rows] for name, values in inputs.items()}


def model_input(inputs: Inputs, *, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """float32 (rows, *row_shape): standardised pictures, or series of them; contiguous."""
    images = inputs[IMAGE]
    if not is_series(inputs):
        return np.ascontiguousarray(preprocessing.standardise(images))
    rows, steps = images.shape[:2]
    present = np.asarray(inputs[PRESENT], np.float32)
    series = np.zeros((rows, *row_shape(inputs)), np.float32)
    real = present > 0
    # Padding is never standardised: a black picture is not zero.
    pictures = preprocessing.standardise(images[real])
    series[real, :-TIME_FEATURES] = pictures.reshape(len(pictures), prod(images.shape[2:]))
    series[:, :, -2] = present
    series[:, :, -1] = np.where(real, np.asarray(inputs[YEARS], np.float32), 0)
    return series


def lengths(inputs: Inputs) -> NDArray[np.int64]:
    """(rows,) real steps of each series. Private."""
    return np.asarray(inputs[PRESENT].sum(axis=1), np.int64)
