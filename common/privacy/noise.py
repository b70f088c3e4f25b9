"""Gaussian noise in whole numbers of a public grid, so that floating point cannot undo it.

Guarantee: with spacing g, a sum S whose units are each rounded to multiples of g, and noise K from
`integer_noise`, what is released is S / g + K, exactly, in int64. K = round(Z / g) + U with Z normal and U
independent of everything, and S / g is whole, so S / g + K = round((S + Z) / g) + U: post-processing of the
Gaussian mechanism on S. Division by a public number and rounding to float32 come after it and are
post-processing as well. No released bit depends on how the noise or the sum was rounded.

Sensitivity: a unit's gradient is clipped to C in float64 (off by less than 1e-9 of C) and rounded coordinate
by coordinate, which moves it by at most g/2 * sqrt(P) for P parameters. The standard deviation is raised by
exactly that factor, 1 + 1e-9 + g sqrt(P) / (2 C), so sigma is what is accounted: less than two in a million
up to 60 million parameters.

The sampler is not the ideal normal: Z comes from 64 random bits by inversion in float64, which alone would
leave holes between grid points beyond 6 sigma (arXiv 2112.05307 exploits such holes). U, uniform over 2**-9
to 2**-8 of a standard deviation, fills them: adding it costs no privacy, and it raises the variance by
1.3e-6. The probability of a window of that width is then right to 1e-5 up to 7 sigma (measured in the tests).
Noise beyond 8.3 sigma (probability 1e-16 a number) has holes again, beyond 9.1 sigma it does not exist.

What remains. Timing: ndtri takes another branch in the tails and is not constant-time, so the seconds of a
step depend on its noise (summed over all parameters) and, far more, on how many patients entered it; clocks
are not noised. Kernels: that a patient's float32 gradient, before clipping, keeps its bits whoever else
enters is the caller's part (`client.training.private`).

Sources: Mironov 2012, On Significance of the Least Significant Bits for Differential Privacy; Jin et al.,
Are We There Yet? Timing and Floating-Point Attacks on Differential Privacy Systems, arXiv 2112.05307.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from common.errors import GuardError
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import Integers, Stream

FINENESS = 2.0**-31
"""Spacing over C, at most: a million units that all point the same way still add up exactly."""
CLIP_SLACK = 1e-9
"""A norm in float64 and its factor are off by less than this share."""
_FILL = 2.0**-8
"""Width of the uniform fill over the standard deviation, at most."""
_MOST_EXACT = 2.0**52
"""Half of the whole numbers that a float64 holds exactly: the sum of the units stays below."""
_LARGEST_NOISE = 10.0
"""Standard deviations that no number of the sampler reaches."""
_BLOCK = 1 << 14


@dataclass(frozen=True, kw_only=True)
class NoiseGrid:
    """Spacing of the grid and the noise on it; a function of the public plan and the model's size alone."""

    spacing: float
    """G, a power of two."""
    noise_stddev: float
    """Sigma * C, raised by the factor that pays for rounding."""
    fill: int
    """Width of the uniform fill, in grid points; a power of two."""

    @classmethod
    def of(cls, plan: PrivacyPlan, *, num_parameters: int) -> Self:
        """The grid of a plan; raises GuardError where whole numbers of it would not hold the sum.

        The spacing is the largest power of two up to FINENESS * C, for example 2**-31 for C = 1.
        """
        if num_parameters < 1:
            raise ValueError(f"a grid needs at least one parameter, got {num_parameters}")
        clip, root = plan.l2_clip_norm, math.sqrt(num_parameters)
        spacing = 2.0 ** math.floor(math.log2(FINENESS * clip))
        stddev = plan.noise_stddev * (1 + CLIP_SLACK + spacing * root / (2 * clip))
        too_many = plan.enrolled_units * clip / spacing > _MOST_EXACT
        if too_many or _LARGEST_NOISE * stddev / spacing > 2.0**62:
            raise GuardError(
                "the plan's sum or noise does not fit into 64-bit whole numbers",
                why=f"{plan.enrolled_units} units and noise multiplier {plan.noise_multiplier:g} "
                f"on a grid of {spacing:g}",
                fix="split the units over several hospitals, or take less noise",
            )
        fill = 2 ** max(0, math.floor(math.log2(_FILL * stddev / spacing)))
        return cls(spacing=spacing, noise_stddev=stddev, fill=fill)


def integer_noise(count: int, *, grid: NoiseGrid, stream: Stream) -> Integers:
    """Independent noise in grid points, int64 (count,); standard deviation `noise_stddev` / `spacing`."""
    noise = np.empty(count, dtype=np.int64)
    scale = grid.noise_stddev / grid.spacing
    for start in range(0, count, _BLOCK):
        block = noise[start : start + _BLOCK]
        normal = np.asarray(stream.normal(len(block)), dtype=np.float64)
        normal *= scale
        block[:] = np.rint(normal, out=normal)
        block += stream.integers(grid.fill, len(block))
        block -= grid.fill // 2
    return noise
