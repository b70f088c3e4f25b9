"""Poisson sampling: who enters a step."""

import numpy as np

from common.privacy.randomness import Integers, Stream


def poisson_sample(num_units: int, sampling_rate: float, stream: Stream) -> Integers:
    """Choose each of 0..num_units-1 with probability `sampling_rate`, independently; ascending.

    The number chosen is random and may be 0: an empty step still adds noise and is charged like any other.
    A rate of 1 chooses everybody and draws nothing.
    """
    if num_units < 0 or not 0 < sampling_rate <= 1:
        raise ValueError(f"needs num_units >= 0 and a rate in (0, 1], got {num_units} and {sampling_rate}")
    if sampling_rate == 1:
        return np.arange(num_units, dtype=np.int64)
    return np.flatnonzero(stream.uniform(num_units) < sampling_rate).astype(np.int64, copy=False)
