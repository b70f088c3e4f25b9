"""Gaussian noise in whole numbers of a public grid, so that floating point cannot undo it.

Guarantee: with spacing g, a sum S, and noise K (`noise_block`), what is released is round(S / g) + K,
exactly: whole numbers in float64, all below 2**53 (`NoiseGrid.of` sees to it). K = round(Z / g) + U with Z
normal and U independent of everything, so the release is round((g round(S / g) + Z) / g) + U: post-processing
of the Gaussian mechanism on S rounded to the grid. Division by a public number and rounding to float32 come
after it and are post-processing as well. No released bit depends on how the noise was rounded; K is never -0,
so not even the sign of a zero does. A sum larger than a plan allows would take nothing from that: both terms
are whole, and to round what they add up to once is post-processing too.

Sensitivity of S rounded to the grid, for one unit more or less: C, plus what finite precision adds, at most
a share of C of
  CLIP_SLACK                      a norm that came out too small,
  2 rounding_of_sums(M)           float64 sums in another order, of at most M sampled units (`most_sampled`),
  g sqrt(P) / C                   rounding to the grid, g / 2 in each of P coordinates and both worlds.
The standard deviation is raised by exactly that factor, so sigma is what is accounted: two in a hundred
thousand where 128 units are expected in a step, and about one in a thousand at 10,000.

The sampler is not the ideal normal: Z comes from 63 + 53 random bits in float64 (`randomness`), which alone
would leave gaps between grid points far out (arXiv 2112.05307 exploits such gaps). U, uniform over 2**-9 to
2**-8 of a standard deviation, fills them: adding it costs no privacy, and it raises the variance by 1.3e-6.
The probability of a window of that width is then right to 1e-5 up to 7 sigma (measured in the tests). Noise
beyond 9.4 sigma does not exist (probability 1e-20 a number).

What remains. Timing: the seconds of a step depend on how many patients entered it; clocks are not noised.
Kernels: that a patient's float32 gradient, before clipping, keeps its bits whoever else enters is the
caller's part (`client.training.private`).

Sources: Mironov 2012, On Significance of the Least Significant Bits for Differential Privacy; Jin et al.,
Are We There Yet? Timing and Floating-Point Attacks on Differential Privacy Systems, arXiv 2112.05307.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from common.errors import GuardError
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import Floats, Halves, Integers, Rooms, Stream

FINENESS = 2.0**-31
"""Spacing over C, at most: a million units that all point the same way still add up exactly."""
CLIP_SLACK = 5e-6
"""Norms may come out too small by this share: sums of 128 squares in float32, 2**-24 each time."""
LARGEST_COHERENCE = 2.0**11
"""Terms of a unit's gradient that cancel to less than one part in so many count as if they left that part."""
MOST_POSITIONS = 2**14
"""Terms that are added to one coordinate in one chunk, at most."""
_FILL = 2.0**-8
"""Width of the uniform fill over the standard deviation, at most."""
_MOST_EXACT = 2.0**52
"""Half of the whole numbers that a float64 holds exactly: the sum of the units stays below, and so does the
noise, so that both together are exact."""
_LARGEST_NOISE = 10.0
"""Standard deviations that no number of the sampler reaches, the fill included."""
_BLOCK = 1 << 18
"""Numbers that are worked on at once: many, because threads beside each other take turns at every call."""


def most_sampled(plan: PrivacyPlan) -> int:
    """Units that enter a step, at most; that more do has a probability below 1e-100."""
    return math.ceil(4 * plan.expected_batch_size) + 1000


def rounding_of_sums(units: int) -> float:
    """By what share of C rounding in float64 may move the sum of so many clipped units, at most.

    Each of m additions is off by 2**-53 of all absolute values together, which are at most
    LARGEST_COHERENCE * C for a unit; m is at most MOST_POSITIONS within a chunk, and at most as many chunks
    follow as there are units. Source: Higham, Accuracy and Stability of Numerical Algorithms, section 4.2.
    """
    return (MOST_POSITIONS + units) * 2.0**-53 * LARGEST_COHERENCE * units


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
        slack = CLIP_SLACK + 2 * rounding_of_sums(most_sampled(plan)) + spacing * root / clip
        stddev = plan.noise_stddev * (1 + slack)
        if max(plan.enrolled_units * clip, _LARGEST_NOISE * stddev) / spacing > _MOST_EXACT:
            raise GuardError(
                "the plan's sum or noise does not fit into the whole numbers that float64 holds",
                why=f"{plan.enrolled_units} units and noise multiplier {plan.noise_multiplier:g} "
                f"on a grid of {spacing:g}",
                fix="split the units over several hospitals, or take less noise",
            )
        fill = 2 ** max(0, math.floor(math.log2(_FILL * stddev / spacing)))
        return cls(spacing=spacing, noise_stddev=stddev, fill=fill)


class _Room:
    def __init__(self) -> None:
        self.noise: Floats = np.empty(_BLOCK)
        self.spare: Floats = np.empty(_BLOCK)


_ROOMS = Rooms(_Room)


def noise_block(into: Floats, spare: Floats, *, grid: NoiseGrid, stream: Stream) -> None:
    """Set `into`, (n,), to independent noise: whole numbers of grid points; overwrites `spare`, (n,).

    Every number takes the same operations, whatever it is.
    """
    stream.fill_normal(into, grid.noise_stddev / grid.spacing)
    np.rint(into, out=into)
    narrow = grid.fill <= 2**31
    fill: Integers | Halves = spare.view(np.int32)[: len(into)] if narrow else spare.view(np.int64)
    stream.fill_integers(grid.fill, fill)
    np.subtract(fill, grid.fill // 2, out=fill)
    np.add(into, fill, out=into)


def integer_noise(count: int, *, grid: NoiseGrid, stream: Stream) -> Integers:
    """Independent noise in grid points, int64 (count,); standard deviation `noise_stddev` / `spacing`."""
    noise = np.empty(count, dtype=np.int64)
    with _ROOMS.borrowed() as room:
        for start in range(0, count, _BLOCK):
            own = noise[start : start + _BLOCK]
            block = room.noise[: len(own)]
            noise_block(block, room.spare[: len(own)], grid=grid, stream=stream)
            np.copyto(own, block, casting="unsafe")
    return noise


def release(
    summed: Floats | None,
    *,
    into: npt.NDArray[np.float32] | Floats,
    grid: NoiseGrid,
    stream: Stream,
    divisor: float,
) -> None:
    """Set `into`, (n,), to (round(summed / g) + noise) g / divisor, the noise that of `integer_noise`.

    summed: (n,), None for zeros. Multiplied in float64 and rounded to float32 once, at the end; float64 and
    the divisor g give the whole numbers themselves. Threads may call it at once, each with a stream of its
    own. Raises ValueError for a sum of another shape.
    """
    if summed is not None and summed.shape != into.shape:
        raise ValueError(f"a sum of shape {summed.shape} cannot be released into {into.shape}")
    with _ROOMS.borrowed() as room:
        for start in range(0, len(into), _BLOCK):
            out = into[start : start + _BLOCK]
            total, spare = room.noise[: len(out)], room.spare[: len(out)]
            noise_block(total, spare, grid=grid, stream=stream)
            if summed is not None:
                # The spacing is a power of two: this is the quotient, exactly.
                np.multiply(summed[start : start + _BLOCK], 1 / grid.spacing, out=spare)
                total += np.rint(spare, out=spare)
            np.multiply(total, grid.spacing / divisor, out=out, casting="unsafe")
