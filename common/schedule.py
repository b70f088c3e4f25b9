"""The step size of a round: a public number that hospitals train with and the server reckons with."""

import math

from common.config import TrainingConfig


def learning_rate(training: TrainingConfig, *, round_number: int, num_rounds: int) -> float:
    """Step size of round 1, 2, ..., num_rounds: constant, or half a cosine from the full size towards 0.

    >>> learning_rate(TrainingConfig(learning_rate=0.5), round_number=7, num_rounds=10)
    0.5
    """
    if not 1 <= round_number <= num_rounds:
        raise ValueError(f"round_number must be in 1..{num_rounds}, got {round_number}")
    if training.learning_rate_schedule == "constant":
        return training.learning_rate
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * (round_number - 1) / num_rounds))
