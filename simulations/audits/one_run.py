"""One-run audit: many patients of our own, each in the hospital by the toss of a coin, and one update.

From the update of one round the attacker guesses who was in, and abstains where unsure. The number of right
guesses bounds epsilon from below, whatever the mechanism is.
Source: Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, arXiv 2305.08846, theorem 5.2.
"""

import numpy as np
from scipy import optimize, stats

from simulations.audits.canary import Claim
from simulations.audits.chance import Vector
from simulations.audits.finding import ALPHA, CLAIMED, CONFIDENCE, EMPIRICAL, Finding
from simulations.audits.probe import along_lit_pixels, blank_network, lit_films, make_plan, noisy_sums

ONE_STEP = Claim(sampling_rate=1.0, noise_multiplier=2.063, steps_per_run=1, delta=1e-10)
"""Claims epsilon 3.0. The delta is tiny because theorem 5.2 pays for it with the number of canaries."""
_MOST_EPSILON = 100.0


def guessing_p_value(*, canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Most probable chance of at least `right` right guesses under (epsilon, delta)-DP.

    `canaries` were each in with probability 1/2, `guesses` were made, for the others the attacker abstained.
    With delta 0 every guess is right with probability at most e^eps / (1 + e^eps), as if on its own; delta
    adds 2 m delta times the largest mean chance of the counts just below (arXiv 2305.08846, theorem 5.2).

    >>> round(guessing_p_value(canaries=1000, guesses=100, right=75, epsilon=0.673, delta=1e-4), 3)
    0.05
    """
    if not 0 <= right <= guesses <= canaries or epsilon < 0 or not 0 <= delta <= 1:
        raise ValueError("needs 0 <= right <= guesses <= canaries, epsilon >= 0 and delta in [0, 1]")
    rate = 1 / (1 + np.exp(-epsilon))
    by_chance = float(stats.binom.sf(right - 1, guesses, rate))
    if delta == 0 or right == 0:
        return min(1.0, by_chance)
    # P[v - i <= Binomial < v] / i for i = 1..v
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, rate))
    steepest = float(np.max(below / np.arange(1, right + 1)))
    return min(1.0, by_chance + 2 * canaries * delta * steepest)


def epsilon_lower_bound(*, canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """Largest epsilon that so many right guesses exclude at `confidence`; 0.0 when they exclude none.

    >>> round(epsilon_lower_bound(canaries=100, guesses=100, right=100, delta=0.0, confidence=0.95), 2)
    3.49
    """

    def excluded(epsilon: float) -> float:
        chance = guessing_p_value(
            canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, delta=delta
        )
        return chance - (1 - confidence)

    if excluded(0.0) >= 0:
        return 0.0
    if excluded(_MOST_EPSILON) < 0:
        return _MOST_EPSILON
    # From below: the bound that is stated is never above the one that holds.
    return float(max(0.0, optimize.bisect(excluded, 0.0, _MOST_EPSILON, xtol=1e-9) - 1e-9))


def guess(scores: Vector, *, guesses: int) -> Vector:
    """1 for the highest scores, -1 for the lowest, half of `guesses` each; 0, no guess, for the rest."""
    order, half = np.argsort(scores), guesses // 2
    guessed = np.zeros(len(scores))
    guessed[order[:half]], guessed[order[len(order) - half :]] = -1, 1
    return guessed


def audit_one_run(
    claim: Claim = ONE_STEP, *, canaries: int = 8100, guesses: int = 800, confidence: float = 0.95
) -> Finding:
    """Black-box: the epsilon that the update of one round proves, beside the claimed one.

    The bound that is reported holds with `confidence`; the audit fails where the guesses were better than the
    claim allows in all but one of a million audits.
    """
    side = int(np.ceil(np.sqrt(canaries)))
    plan = make_plan(
        sampling_rate=claim.sampling_rate,
        noise_multiplier=claim.noise_multiplier,
        steps=claim.steps_per_run,
        enrolled_units=canaries // 2,
    )
    present = np.random.default_rng().random(canaries) < 0.5
    sums = noisy_sums(model=blank_network(side), examples=lit_films(np.flatnonzero(present), side), plan=plan)
    guessed = guess(along_lit_pixels(sums)[:canaries], guesses=guesses)
    right = int(np.sum(guessed == np.where(present, 1, -1)))
    made, claimed = int(np.sum(guessed != 0)), claim.epsilon()
    bound = epsilon_lower_bound(
        canaries=canaries, guesses=made, right=right, delta=claim.delta, confidence=confidence
    )
    chance = guessing_p_value(
        canaries=canaries, guesses=made, right=right, epsilon=claimed, delta=claim.delta
    )
    passed = chance >= ALPHA
    said = (
        f"From one update an attacker places {right} of {made} of our own patients right "
        f"and proves epsilon {bound:.2f} of the claimed {claimed:.2f}."
    )
    return Finding(
        audit="one-run",
        passed=passed,
        said=said if passed else f"{said} More leaks than is claimed.",
        numbers={
            CLAIMED: claimed,
            EMPIRICAL: bound,
            CONFIDENCE: confidence,
            "chance of such guesses under the claim": chance,
            "delta": claim.delta,
            "canaries": canaries,
            "guesses": made,
            "right guesses": right,
        },
        black_box=True,
    )
