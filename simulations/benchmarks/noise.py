"""What noise costs that floating point cannot undo, beside noise as it is usually made."""

import statistics
from typing import Any

import numpy as np
import torch

from common.privacy.noise import NoiseGrid, release
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import SecureRandomness
from simulations.benchmarks.cases import StepCase
from simulations.benchmarks.interleaving import interleave

LARGE_MODEL = 25_000_000
"""Parameters of a ResNet-50."""


def measure_noise(*, numbers: int = 1_000_000, repeats: int = 15, budget_s: float = 20.0) -> dict[str, Any]:
    """Nanoseconds a parameter by way, and the seconds that ours takes for a large model (computed).

    torch: normals of torch's generator, what Opacus draws by default. torch-four: half the sum of four of
    them, its secure mode, here still without a cryptographic generator. cipher: our generator without the
    grid. grid: what a step does, from the sum in float64 to the noised mean in float32.
    """
    plan = PrivacyPlan(
        sampling_rate=0.5,
        l2_clip_norm=1.0,
        noise_multiplier=1.0,
        steps=1,
        enrolled_units=1000,
        max_rows_per_unit=1,
        unit="patient",
    )
    grid = NoiseGrid.of(plan, num_parameters=numbers)
    summed, released = np.zeros(numbers), np.zeros(numbers, dtype=np.float32)
    stream = SecureRandomness().stream(purpose="noise", round_number=1, step=0)
    ways = {
        "torch": lambda: torch.normal(0.0, 1.0, (numbers,)),
        "torch-four": lambda: sum(torch.normal(0.0, 1.0, (numbers,)) for _ in range(4)) / 2,
        "cipher": lambda: np.multiply(stream.normal(numbers), plan.noise_stddev),
        "grid": lambda: release(
            summed, into=released, grid=grid, stream=stream, divisor=plan.expected_batch_size
        ),
    }
    seconds = interleave(ways, repeats=repeats, budget_s=budget_s)
    nanoseconds = {way: 1e9 * statistics.median(values) / numbers for way, values in seconds.items()}
    return {
        "nanoseconds": nanoseconds,
        "seconds_large_model": 1e-9 * nanoseconds["grid"] * LARGE_MODEL,
        "parameters_large_model": LARGE_MODEL,
        "raw": {"numbers": numbers, "seconds": seconds},
    }


def share_of_step(case: StepCase, *, nanoseconds: float, seconds_dp: float) -> float:
    """Part of a private step of the case that goes into its noise, at so many nanoseconds a parameter."""
    return 1e-9 * nanoseconds * case.num_parameters / seconds_dp
