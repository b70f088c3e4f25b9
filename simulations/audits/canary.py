"""Canary audits: an attacker cannot tell whether a patient was there any better than the accountant says.

The patient's film lights one pixel that is dark in all others, so that the clipped gradient has norm C in a
direction that nobody else touches: the worst case of the mechanism. Two worlds, with and without the
patient, through `train_privately`; what is released in that direction decides. White-box: every step is seen.
Black-box: only the update of a whole round is. A bound above the claim proves a defect; one below nothing.
Source: Nasr et al., Tight Auditing of Differentially Private Machine Learning, arXiv 2302.07956.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from common.examples import Examples
from common.privacy.plan import PrivacyEvent, PrivacyPlan
from simulations.audits.chance import Vector, at_most
from simulations.audits.finding import ALPHA, CLAIMED, CONFIDENCE, EMPIRICAL, Finding
from simulations.audits.probe import (
    CLIP,
    FromBlack,
    along_lit_pixels,
    blank_network,
    make_plan,
    noisy_sums,
    table,
)
from simulations.audits.released_steps import watched_steps

SIDE, DARK = 4, 13
"""The films are 4 x 4; pixel 13 is dark in all but the canary's."""
OTHERS = 6


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A mechanism and what is claimed for `steps_per_run` of its steps."""

    sampling_rate: float
    noise_multiplier: float
    steps_per_run: int
    delta: float

    def plan(self, runs: int) -> PrivacyPlan:
        """The plan of so many runs, one after the other."""
        return make_plan(
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            steps=runs * self.steps_per_run,
            enrolled_units=10,
        )

    def epsilon(self) -> float:
        """What the accountant claims for one run, from this claim's own numbers."""
        from common.privacy.accountant import epsilon

        event = PrivacyEvent(
            sampling_rate=self.sampling_rate, noise_multiplier=self.noise_multiplier, steps=self.steps_per_run
        )
        return epsilon([event], delta=self.delta)


FULL_BATCH = Claim(sampling_rate=1.0, noise_multiplier=2.782, steps_per_run=4, delta=1e-5)
SAMPLED = Claim(sampling_rate=0.5, noise_multiplier=0.701, steps_per_run=4, delta=0.1)
"""Both claim epsilon 3.0. The delta of the second is not one to train with: close to the delta at which the
trade-off of errors touches the claim, a few thousand runs show most of the epsilon."""


def films(*, with_canary: bool) -> Examples:
    """Random films with one dark pixel; the last one, when there, has that pixel lit and no other."""
    rng = np.random.default_rng(2)
    images = rng.integers(1, 256, (OTHERS + 1, 1, SIDE, SIDE), dtype=np.uint8)
    images.reshape(OTHERS + 1, -1)[:, DARK] = 0
    images[-1] = 0
    images[-1].flat[DARK] = 255
    everybody = table(images, np.arange(OTHERS + 1) % 2)  # the canary's class is 0
    return everybody if with_canary else everybody.select_units(np.arange(OTHERS))


def observations(claim: Claim, *, with_canary: bool, runs: int) -> NDArray[np.float64]:
    """White-box, (runs, steps_per_run): what each step releases in the canary's direction, in units of C.

    Without a step that moves the weights, all steps are runs of the same experiment.
    """
    with watched_steps(keep=_canary_only) as steps:
        noisy_sums(model=blank_network(SIDE), examples=films(with_canary=with_canary), plan=claim.plan(runs))
    seen = np.array([float(step.release[0]) * step.divisor for step in steps]) / CLIP
    return seen.reshape(runs, -1)


def summed_observations(claim: Claim, *, with_canary: bool, runs: int) -> Vector:
    """Black-box, (runs,): what the update of each run says of the canary's direction, in units of C."""
    examples, preprocessing = films(with_canary=with_canary), FromBlack(image_size=SIDE, channels=1)
    plan = claim.plan(1)
    updates = [
        noisy_sums(model=blank_network(SIDE), examples=examples, plan=plan, preprocessing=preprocessing)
        for _ in range(runs)
    ]
    return np.array([along_lit_pixels(sums)[DARK] for sums in updates])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the attacker saw of many runs, larger where the patient rather was there."""

    there: Vector
    away: Vector
    midpoint: float
    """Threshold fixed beforehand, halfway between the worlds."""

    def errors(self, part: slice, threshold: float, *, confidence: float) -> tuple[float, float]:
        """Upper bounds, both holding with `confidence`, of taking away for there and there for away."""
        there, away, each = self.there[part], self.away[part], 1 - (1 - confidence) / 2
        return (
            at_most(int(np.sum(~(away <= threshold))), len(away), confidence=each),
            at_most(int(np.sum(there <= threshold)), len(there), confidence=each),
        )


def scores(claim: Claim, *, runs: int, black_box: bool) -> Scores:
    """The attacker's scores: the sum of a run in full batches, else the log-likelihood ratio of the claim."""
    see = summed_observations if black_box else observations
    there, away = (see(claim, with_canary=with_canary, runs=runs) for with_canary in (True, False))
    if claim.sampling_rate == 1:
        totals = [seen.reshape(runs, -1).sum(axis=1) for seen in (there, away)]
        return Scores(there=totals[0], away=totals[1], midpoint=claim.steps_per_run / 2)
    ratio = _ratio_of_sum if black_box else _ratio_of_steps
    return Scores(there=ratio(claim, there), away=ratio(claim, away), midpoint=0.0)


def gaussian_lower_bound(claim: Claim, seen: Scores, *, confidence: float) -> float:
    """Lower bound of epsilon of a mechanism that is mu-GDP, as full batches are, at the fixed threshold."""
    false_positives, false_negatives = seen.errors(slice(None), seen.midpoint, confidence=confidence)
    mu = stats.norm.isf(false_positives) - stats.norm.ppf(false_negatives)
    return gaussian_epsilon(float(mu), claim.delta)


def lower_bound(claim: Claim, seen: Scores, *, confidence: float) -> float:
    """Lower bound of epsilon whatever the mechanism is.

    The threshold is the best one on the first quarter of the runs and is judged on the others.
    """
    first = len(seen.there) // 4

    def bound(part: slice, threshold: float) -> float:
        false_positives, false_negatives = seen.errors(part, threshold, confidence=confidence)
        return float(np.log(max(1 - claim.delta - false_negatives, 1e-12) / false_positives))

    known = np.concatenate([seen.there[:first], seen.away[:first]])
    best = max(np.quantile(known, np.linspace(0, 1, 200)), key=lambda t: bound(slice(0, first), float(t)))
    return max(0.0, bound(slice(first, None), float(best)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-GDP at `delta` (Dong et al., arXiv 1905.02383, corollary 2.13).

    >>> round(gaussian_epsilon(1.0, 1e-5), 3)
    4.377
    """

    def excess(eps: float) -> float:
        return float(
            stats.norm.cdf(-eps / mu + mu / 2) - np.exp(eps + stats.norm.logcdf(-eps / mu - mu / 2)) - delta
        )

    return 0.0 if not mu > 0 or excess(0.0) <= 0 else float(optimize.brentq(excess, 0.0, 700.0))


def audit_canary(
    claim: Claim = FULL_BATCH, *, runs: int = 2000, confidence: float = 0.95, black_box: bool = False
) -> Finding:
    """Compare the epsilon that an attacker proves from `runs` runs in each world with the claimed one.

    The bound that is reported holds with `confidence`; the audit fails where even the bound that errs once in
    a million audits is above the claim.
    """
    seen = scores(claim, runs=runs, black_box=black_box)
    bound_of = gaussian_lower_bound if claim.sampling_rate == 1 else lower_bound
    claimed, bound = claim.epsilon(), bound_of(claim, seen, confidence=confidence)
    surely = bound_of(claim, seen, confidence=1 - ALPHA)
    passed = surely <= claimed
    kind = "full batches" if claim.sampling_rate == 1 else "sampled steps"
    what = "the update" if black_box else "every step"
    said = (
        f"An attacker who sees {what} of {runs} runs proves epsilon {bound:.2f} of the claimed {claimed:.2f}."
    )
    return Finding(
        audit=f"canary, {kind}{', black box' if black_box else ''}",
        passed=passed,
        said=said if passed else f"{said} More leaks than is claimed.",
        numbers={
            CLAIMED: claimed,
            EMPIRICAL: bound,
            CONFIDENCE: confidence,
            "bound that errs once in a million": surely,
            "delta": claim.delta,
            "runs in each world": runs,
        },
        black_box=black_box,
    )


def _canary_only(vector: Vector) -> Vector:
    return along_lit_pixels(vector)[DARK : DARK + 1] * CLIP


def _ratio_of_steps(claim: Claim, seen: Vector) -> Vector:
    q, variance = claim.sampling_rate, claim.noise_multiplier**2
    return np.asarray(np.logaddexp(np.log1p(-q), np.log(q) + (seen - 0.5) / variance).sum(axis=1))


def _ratio_of_sum(claim: Claim, seen: Vector) -> Vector:
    """Of a sum of steps: a binomial mixture of normals over one of them."""
    steps, variance = claim.steps_per_run, claim.noise_multiplier**2 * claim.steps_per_run
    times = np.arange(steps + 1)
    weights = stats.binom.logpmf(times, steps, claim.sampling_rate)
    exponents = weights + (seen[:, None] * times - times**2 / 2) / variance
    return np.asarray(np.logaddexp.reduce(exponents, axis=1))
