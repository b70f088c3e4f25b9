"""How far single patients moved a sum, and the movements that need patients and weights of their own.

Each is read from the update of a round with hardly any noise, in units of C.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from common.errors import GuardError
from common.preprocessing import Preprocessing
from simulations.audits.chosen_weights import (
    FEW,
    HUGE_FACTOR,
    MORE,
    SIZE,
    cancelling_patient,
    half_lit_patient,
    network_of_attacker,
    network_of_equal_squares,
    network_that_cancels,
    network_that_is_sure,
    patients,
)
from simulations.audits.finding import ALPHA
from simulations.audits.probe import CLIP, HARDLY_ANY_NOISE, blank_network, lit_films, make_plan, noisy_sums

WITHOUT_EFFECT = ("nan", "infinite", "nothing")
"""Such a patient must count as zero."""
CHOSEN_WEIGHTS = "weights chosen by an attacker"
CANCELLING = "images that cancel but for last bits"
TINY = "gradients and a clip of next to nothing"
EQUAL_SQUARES = "a large layer with equal gradients"
ROUNDING = 1e-5
_SEVERAL = 3


@dataclass(frozen=True, kw_only=True)
class Moved:
    """One movement and what it may be."""

    kind: str
    by: float
    """In units of C; nan where a sum is not finite."""
    tolerance: float
    short: float = 0.0
    """By how much automatic clipping may leave a gradient short of the bound; not more is allowed."""

    @property
    def allowed(self) -> bool:
        """Comparisons with nan are false: not finite is not allowed."""
        least = 1e-4 if self.kind in WITHOUT_EFFECT else 1.0
        return self.by <= least + self.tolerance

    @property
    def reached(self) -> bool:
        """The clip is what holds the patient: the bound is reached, not merely kept."""
        exempt = (*WITHOUT_EFFECT, CHOSEN_WEIGHTS, CANCELLING, TINY)
        return self.kind in exempt or self.by > 0.999 - self.tolerance - self.short


def over_several_steps() -> Moved:
    """The part of one patient in a round of several steps: what is left of a step must not enter the next."""
    side, plan = 4, make_plan(steps=_SEVERAL)
    lit = np.arange(6)
    there, away = (
        noisy_sums(model=blank_network(side), examples=lit_films(pixels, side), plan=plan)
        for pixels in (lit, lit[:-1])
    )
    by = float(np.linalg.norm(there - away)) / (_SEVERAL * CLIP)
    return Moved(kind="several steps", by=by, tolerance=ROUNDING + largest_noise(2 * side * side))


def with_chosen_weights() -> Moved:
    """One patient more where that picks other kernels, whose last bits the weights make large."""
    plan = make_plan()
    there, away = (
        noisy_sums(
            model=network_of_attacker()[0],
            examples=patients(count),
            plan=plan,
            learning_rate=1e4 * plan.enrolled_units / CLIP,
            preprocessing=Preprocessing(image_size=SIZE, channels=1),
        )
        for count in (MORE, FEW)
    )
    # Beside weights of 1e8 an update is only known to a hundredth; the attack would move it by a dozen C.
    return Moved(kind=CHOSEN_WEIGHTS, by=float(np.linalg.norm(there - away)) / CLIP, tolerance=0.1)


def that_cancels(*, tried: int = 12) -> Moved:
    """A patient alone whose gradient is what two huge ones leave of each other."""
    plan, moved = make_plan(), []
    for seed in range(tried):
        released = noisy_sums(
            model=network_that_cancels(seed),
            examples=cancelling_patient(),
            plan=plan,
            # So large that the old weights do not show.
            learning_rate=100 * HUGE_FACTOR * plan.enrolled_units / CLIP,
        )
        moved.append(float(np.linalg.norm(released)) / CLIP)
    weights = len(released)
    return Moved(kind=CANCELLING, by=max(moved), tolerance=ROUNDING + largest_noise(weights))


def with_a_tiny_clip() -> Moved:
    """A patient alone whose gradient is too small for squares in float32; such a clip may also be refused."""
    moved = 0.0
    for clip in (1e-12, 1e-20, 1e-27, 1e-30):
        plan = make_plan(l2_clip_norm=clip)
        try:
            released = noisy_sums(
                model=network_that_is_sure(),
                examples=lit_films([0], 4),
                plan=plan,
                learning_rate=1e4 * plan.enrolled_units / clip,
            )
        except GuardError:
            continue
        moved = max(moved, float(np.linalg.norm(released)) / clip)
    # The bias of 57 is known to 4e-6, a step is 1e4 C.
    return Moved(kind=TINY, by=moved, tolerance=ROUNDING + largest_noise(66))


def in_a_large_layer() -> Moved:
    """A patient alone, with a quarter of a million numbers of one size."""
    plan = make_plan(max_rows_per_unit=1)
    released = noisy_sums(
        model=network_of_equal_squares(),
        examples=half_lit_patient(),
        plan=plan,
        learning_rate=1e4 * plan.enrolled_units / CLIP,
        physical_batch_size=1,
    )
    # The noise is at right angles to the patient: its square is added, which is 1e-6.
    return Moved(kind=EQUAL_SQUARES, by=float(np.linalg.norm(released)) / CLIP, tolerance=3 * ROUNDING)


def largest_noise(weights: int) -> float:
    """Norm of the noise of two runs, in units of C, that is exceeded with probability ALPHA / 1000."""
    return float(HARDLY_ANY_NOISE * np.sqrt(2 * stats.chi2.isf(ALPHA / 1000, weights)))
