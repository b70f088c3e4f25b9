"""Watches the optimiser of the production path: what it held before the noise, what it released."""

from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
from scipy import stats

from client.patient_optimizer import PatientDPOptimizer
from common.privacy.randomness import SecureRandomness

ALPHA = 1e-6
"""Probability of a false alarm of one audit."""


@dataclass
class Step:
    """One step of DP-SGD, flat float64 vectors over all parameters."""

    clipped_sum: np.ndarray
    release: np.ndarray
    """What left: (clipped sum + noise) / (q n)."""
    divisor: float
    sizes: tuple[int, ...]
    """Numbers of each parameter."""

    @property
    def noise(self) -> np.ndarray:
        return self.release * self.divisor - self.clipped_sum

    @property
    def noise_by_parameter(self) -> list[np.ndarray]:
        return np.split(self.noise, np.cumsum(self.sizes)[:-1])


@contextmanager
def watched_steps(*, keep=lambda vector: vector):
    """Collect every step that runs inside; `keep` may cut the vectors down."""
    steps: list[Step] = []
    real = PatientDPOptimizer.add_noise

    def watching(optimizer):
        parameters = optimizer.params
        sums = [
            np.zeros(p.numel()) if p.summed_grad is None else p.summed_grad.double().numpy().ravel().copy()
            for p in parameters
        ]
        real(optimizer)
        releases = [p.grad.double().numpy().ravel() for p in parameters]
        steps.append(
            Step(
                clipped_sum=keep(np.concatenate(sums)),
                release=keep(np.concatenate(releases)),
                divisor=optimizer.plan.sampling_rate * optimizer.plan.enrolled_units,
                sizes=tuple(p.numel() for p in parameters),
            )
        )

    with patch.object(PatientDPOptimizer, "add_noise", watching):
        yield steps


def variance_p_value(values, *, stddev):
    """Two-sided chi-square probability of the values' mean square if they are N(0, stddev^2)."""
    statistic = float(np.sum(np.square(values))) / stddev**2
    tail = min(stats.chi2.cdf(statistic, len(values)), stats.chi2.sf(statistic, len(values)))
    return 2 * float(tail)


def correlation_p_value(first, second):
    """Two-sided probability of the inner product of two equally long vectors if they are independent."""
    r = float(first @ second / np.sqrt((first @ first) * (second @ second)))
    return float(2 * stats.norm.sf(abs(r) * np.sqrt(len(first))))


class NotedSteps(SecureRandomness):
    """Production randomness that also notes when a step begins."""

    def __init__(self):
        self.begun = 0

    def stream(self, *, purpose, round_number, step):
        if purpose == "sampling":
            self.begun += 1
        return super().stream(purpose=purpose, round_number=round_number, step=step)
