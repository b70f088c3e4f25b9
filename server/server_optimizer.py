"""Server optimisers: from global weights and mean update to the next weights; pure, state in and out.

The mean update of a round plays the part of the negative gradient. All arithmetic is float64, a block
at a time; weights and state are kept in float32, so a resumed run goes on with the same bits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common.parameters import Parameters
from common.server_settings import ServerSection

ADAM_BETA2 = 0.99
ADAM_TAU = 1e-3
"""Second decay and adaptivity of FedAdam, the values of Reddi et al. 2021, section 5."""

_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """What an optimiser remembers between rounds; empty at the start and for `plain`."""

    first_moment: Parameters = field(default_factory=dict)
    second_moment: Parameters = field(default_factory=dict)


def next_weights(
    weights: Parameters,
    update: Parameters,
    state: OptimizerState,
    settings: ServerSection,
    *,
    out: Parameters | None = None,
) -> tuple[Parameters, OptimizerState]:
    """Apply the configured optimiser to one mean update.

    `out` takes the new weights: arrays like `update`, or `update` itself, whose numbers are then lost.
    """
    if settings.optimizer == "momentum":
        return fedavgm(
            weights, update, state, learning_rate=settings.learning_rate, momentum=settings.momentum, out=out
        )
    if settings.optimizer == "adam":
        return fedadam(
            weights, update, state, learning_rate=settings.learning_rate, beta1=settings.momentum, out=out
        )
    return fedavg(weights, update, learning_rate=settings.learning_rate, out=out), state


def fedavg(
    weights: Parameters, update: Parameters, *, learning_rate: float, out: Parameters | None = None
) -> Parameters:
    """Move by lr * d. Example: w = 1, d = 0.5, lr = 1 gives 1.5."""
    moved = _like(weights) if out is None else out
    for name in weights:
        for w, d, to in _blocks(weights[name], update[name], moved[name]):
            to[:] = _float32(_wide(w) + learning_rate * _wide(d))
    return {name: moved[name] for name in weights}


def fedavgm(
    weights: Parameters,
    update: Parameters,
    state: OptimizerState,
    *,
    learning_rate: float,
    momentum: float,
    out: Parameters | None = None,
) -> tuple[Parameters, OptimizerState]:
    """Move with momentum: v <- momentum * v + d, w <- w + lr * v, from v = 0 (Hsu et al. 2019, section 4)."""
    moved, velocity = _like(weights) if out is None else out, _like(update)
    for name in weights:
        before = _or_full(state.first_moment, name, update[name], 0.0)
        for w, d, v, to, v_to in _blocks(weights[name], update[name], before, moved[name], velocity[name]):
            v_to[:] = _float32(momentum * _wide(v) + d)
            to[:] = _float32(_wide(w) + learning_rate * _wide(v_to))
    return {name: moved[name] for name in weights}, OptimizerState(first_moment=velocity)


def fedadam(
    weights: Parameters,
    update: Parameters,
    state: OptimizerState,
    *,
    learning_rate: float,
    beta1: float,
    out: Parameters | None = None,
) -> tuple[Parameters, OptimizerState]:
    """FedAdam (Reddi et al. 2021, algorithm 2), from m = 0 and v = tau^2, without bias correction.

    m <- beta1 m + (1 - beta1) d,  v <- beta2 v + (1 - beta2) d^2,  w <- w + lr m / (sqrt(v) + tau)
    """
    moved, first, second = _like(weights) if out is None else out, _like(update), _like(update)
    for name, delta in update.items():
        means = _or_full(state.first_moment, name, delta, 0.0)
        squares = _or_full(state.second_moment, name, delta, ADAM_TAU**2)
        arrays = (weights[name], delta, means, squares, moved[name], first[name], second[name])
        for w, d, m, v, to, m_to, v_to in _blocks(*arrays):
            mean = beta1 * _wide(m) + (1 - beta1) * _wide(d)
            square = ADAM_BETA2 * _wide(v) + (1 - ADAM_BETA2) * np.square(_wide(d))
            m_to[:], v_to[:] = _float32(mean), _float32(square)
            step = learning_rate * _wide(m_to) / (np.sqrt(_wide(v_to)) + ADAM_TAU)
            to[:] = _float32(_wide(w) + step)
    return {name: moved[name] for name in weights}, OptimizerState(first_moment=first, second_moment=second)


def moving_average(
    average: Parameters, weights: Parameters, *, decay: float, round_number: int
) -> Parameters:
    """Average the weights: a <- b a + (1 - b) w with b = min(decay, (1 + t) / (10 + t)) in round t.

    The slow start lets the average forget the random initial weights (the rule of TensorFlow's average).
    """
    b = min(decay, (1 + round_number) / (10 + round_number))
    averaged = _like(weights)
    for name in weights:
        for a, w, to in _blocks(average[name], weights[name], averaged[name]):
            to[:] = _float32(b * _wide(a) + (1 - b) * _wide(w))
    return averaged


def _blocks(*arrays: npt.NDArray[np.float32]) -> Iterator[tuple[npt.NDArray[np.float32], ...]]:
    """The same stretch of each of several arrays of one shape, as views: float64 is needed of no more."""
    flat = [np.atleast_1d(array).reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, _BLOCK):
        yield tuple(one[start : start + _BLOCK] for one in flat)


def _like(arrays: Parameters) -> Parameters:
    return {name: np.empty(array.shape, dtype=np.float32) for name, array in arrays.items()}


def _or_full(
    arrays: Mapping[str, npt.NDArray[np.float32]], name: str, like: npt.NDArray[np.float32], value: float
) -> npt.NDArray[np.float32]:
    if name in arrays:
        return arrays[name]
    return np.broadcast_to(np.full(1, value, dtype=np.float32), like.size)


def _wide(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return array.astype(np.float64)


def _float32(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # the round refuses a model that is not finite
        return array.astype(np.float32)
