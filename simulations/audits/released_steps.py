"""Watches the optimiser of the production path: what it held before the noise, what it released."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import client.training.private

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of DP-SGD, flat float64 vectors over all parameters. Only for patients who do not exist."""

    clipped_sum: Vector
    release: Vector
    """What left: (clipped sum + noise) / (q n)."""
    divisor: float
    """The plan's q n."""
    sizes: tuple[int, ...]
    """Numbers of each parameter."""

    @property
    def noise(self) -> Vector:
        """What was added to the sum."""
        return self.release * self.divisor - self.clipped_sum

    @property
    def noise_by_parameter(self) -> list[Vector]:
        """`noise` cut at the parameters."""
        return np.split(self.noise, np.cumsum(self.sizes)[:-1])


def _everything(vector: Vector) -> Vector:
    return vector


@contextmanager
def watched_steps(*, keep: Callable[[Vector], Vector] = _everything) -> Iterator[list[Step]]:
    """Collect every step that runs inside; `keep` may cut the vectors down. Changes nothing of the steps."""
    steps: list[Step] = []
    # Looked up now: whatever add_noise the production path would run is the one that runs.
    training: Any = client.training.private
    optimiser = training.PatientDPOptimizer
    real = optimiser.add_noise

    def watching(self: Any) -> None:
        held = [
            np.zeros(p.numel()) if p.summed_grad is None else p.summed_grad.double().numpy().ravel().copy()
            for p in self.params
        ]
        real(self)
        released = [p.grad.double().numpy().ravel() for p in self.params]
        steps.append(
            Step(
                clipped_sum=keep(np.concatenate(held)),
                release=keep(np.concatenate(released)),
                divisor=self.plan.sampling_rate * self.plan.enrolled_units,
                sizes=tuple(p.numel() for p in self.params),
            )
        )

    optimiser.add_noise = watching
    try:
        yield steps
    finally:
        optimiser.add_noise = real
