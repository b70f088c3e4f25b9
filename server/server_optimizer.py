"""Server optimisers: from global weights and mean update to the next weights; pure, state in and out.

The mean update of a round plays the part of the negative gradient. All arithmetic is float64 per array;
weights and state are kept in float32, so a resumed run goes on with the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common.config import ServerSection
from common.parameters import Parameters

ADAM_BETA2 = 0.99
ADAM_TAU = 1e-3
"""Second decay and adaptivity of FedAdam, the values of Reddi et al. 2021, section 5."""


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """What an optimiser remembers between rounds; empty at the start and for `plain`."""

    first_moment: Parameters = field(default_factory=dict)
    second_moment: Parameters = field(default_factory=dict)


def next_weights(
    weights: Parameters, update: Parameters, state: OptimizerState, settings: ServerSection
) -> tuple[Parameters, OptimizerState]:
    """Apply the configured optimiser to one mean update."""
    if settings.optimizer == "momentum":
        return fedavgm(
            weights, update, state, learning_rate=settings.learning_rate, momentum=settings.momentum
        )
    if settings.optimizer == "adam":
        return fedadam(weights, update, state, learning_rate=settings.learning_rate, beta1=settings.momentum)
    return fedavg(weights, update, learning_rate=settings.learning_rate), state


def fedavg(weights: Parameters, update: Parameters, *, learning_rate: float) -> Parameters:
    """Move by lr * d. Example: w = 1, d = 0.5, lr = 1 gives 1.5."""
    return {name: _float32(_wide(weights[name]) + learning_rate * _wide(update[name])) for name in weights}


def fedavgm(
    weights: Parameters, update: Parameters, state: OptimizerState, *, learning_rate: float, momentum: float
) -> tuple[Parameters, OptimizerState]:
    """Move with momentum: v <- momentum * v + d, w <- w + lr * v, from v = 0 (Hsu et al. 2019, section 4)."""
    velocity = {
        name: _float32(momentum * _wide(_or_zeros(state.first_moment, name, delta)) + delta)
        for name, delta in update.items()
    }
    moved = {name: _float32(_wide(weights[name]) + learning_rate * _wide(velocity[name])) for name in weights}
    return moved, OptimizerState(first_moment=velocity)


def fedadam(
    weights: Parameters, update: Parameters, state: OptimizerState, *, learning_rate: float, beta1: float
) -> tuple[Parameters, OptimizerState]:
    """FedAdam (Reddi et al. 2021, algorithm 2), from m = 0 and v = tau^2, without bias correction.

    m <- beta1 m + (1 - beta1) d,  v <- beta2 v + (1 - beta2) d^2,  w <- w + lr m / (sqrt(v) + tau)
    """
    first, second, moved = {}, {}, {}
    for name, delta in update.items():
        start = state.second_moment.get(name, np.full(delta.shape, ADAM_TAU**2, dtype=np.float32))
        mean = beta1 * _wide(_or_zeros(state.first_moment, name, delta)) + (1 - beta1) * _wide(delta)
        square = ADAM_BETA2 * _wide(start) + (1 - ADAM_BETA2) * np.square(_wide(delta))
        first[name], second[name] = _float32(mean), _float32(square)
        step = learning_rate * _wide(first[name]) / (np.sqrt(_wide(second[name])) + ADAM_TAU)
        moved[name] = _float32(_wide(weights[name]) + step)
    return moved, OptimizerState(first_moment=first, second_moment=second)


def moving_average(
    average: Parameters, weights: Parameters, *, decay: float, round_number: int
) -> Parameters:
    """Average the weights: a <- b a + (1 - b) w with b = min(decay, (1 + t) / (10 + t)) in round t.

    The slow start lets the average forget the random initial weights (the rule of TensorFlow's average).
    """
    b = min(decay, (1 + round_number) / (10 + round_number))
    return {name: _float32(b * _wide(average[name]) + (1 - b) * _wide(weights[name])) for name in weights}


def _or_zeros(
    arrays: Mapping[str, npt.NDArray[np.float32]], name: str, like: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    return arrays.get(name, np.zeros_like(like))


def _wide(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return array.astype(np.float64)


def _float32(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # the round refuses a model that is not finite
        return array.astype(np.float32)
