"""LiRA, the likelihood-ratio attack on membership, and what it proves.

Online variant with a Gaussian fit of the logit-scaled confidence and one variance for all patients (there are
few models). Source: Carlini et al., Membership Inference Attacks From First Principles, arXiv 2112.03570,
algorithm 1.

Decisions about one model, or about one patient, depend on each other. The lower limit of the true positive
rate is therefore a bootstrap that draws models and patients (Owen, The pigeonhole bootstrap, arXiv
0711.2168), an approximation. The bound on epsilon is none: it rests on the independent tosses of who is in.
Half of the models are shadows only and the other half is guessed, so that no guess has seen a toss that is to
be guessed; then the halves change places, each bound with half the error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulations.audits.finding import ALPHA
from simulations.audits.one_run import epsilon_lower_bound

Scores = npt.NDArray[np.float64]
"""(models, patients)."""
Membership = npt.NDArray[np.bool_]
"""(models, patients): who was in which model, by independent fair tosses."""

FALSE_POSITIVES = 0.01
LIMIT = 0.95
"""Confidence of the lower limit of the true positive rate."""
GUESSED = 0.25
"""Share of the tosses that are guessed for the bound on epsilon, the surest ones."""
_BOOTSTRAPS = 400
_LEAST_VARIANCE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Attack:
    """How well the models of one kind gave away who was in them."""

    ratios: Scores
    """Logarithm of the likelihood ratio of each decision, leave-one-out."""
    true_positives: float
    """Rate at FALSE_POSITIVES."""
    true_positives_lower: float
    """Its lower limit at confidence LIMIT."""
    auc: float
    """Probability that a member is ranked above a patient who was out."""
    epsilon_lower: float
    """Bound that holds with probability 1 - ALPHA, at the delta that was asked for."""


def likelihood_ratios(
    confidences: Scores, member: Membership, *, attacked: int, shadows: Sequence[int]
) -> Scores:
    """Log of how much likelier each patient's confidence is if they were in: (patients,), for one model.

    The shadow models give each patient's mean when in and when out, and one variance of each kind. A patient
    whom no shadow model had in (or out) gets 0: there is nothing to compare with.
    """
    seen, there = confidences[list(shadows)], member[list(shadows)]

    def fit(chosen: Membership) -> tuple[Scores, float, npt.NDArray[np.int64]]:
        count = chosen.sum(axis=0)
        mean = np.where(chosen, seen, 0).sum(axis=0) / np.maximum(count, 1)
        freedom = max(1, int(np.maximum(count - 1, 0).sum()))
        return (
            mean,
            max(float(np.where(chosen, (seen - mean) ** 2, 0).sum()) / freedom, _LEAST_VARIANCE),
            count,
        )

    (mean_in, variance_in, count_in), (mean_out, variance_out, count_out) = fit(there), fit(~there)
    values = confidences[attacked]
    ratio = (values - mean_out) ** 2 / (2 * variance_out) - (values - mean_in) ** 2 / (2 * variance_in)
    ratio += 0.5 * np.log(variance_out / variance_in)
    return np.where((count_in > 0) & (count_out > 0), ratio, 0.0)


def true_positive_rate(ratios: Scores, member: Membership, weights: Scores | None = None) -> float:
    """Share of members above the lowest threshold that at most FALSE_POSITIVES of the others exceed."""
    weights = np.ones(ratios.shape) if weights is None else weights
    order = np.argsort(-ratios, axis=None, kind="stable")
    inside, weight = member.ravel()[order], weights.ravel()[order]
    false = np.cumsum(weight * ~inside) / max(float((weight * ~inside).sum()), 1e-12)
    true = np.cumsum(weight * inside) / max(float((weight * inside).sum()), 1e-12)
    allowed = np.flatnonzero(false <= FALSE_POSITIVES)
    return float(true[allowed[-1]]) if len(allowed) else 0.0


def lower_limit(ratios: Scores, member: Membership, *, seed: int) -> float:
    """Lower limit of the true positive rate: models and patients are drawn again, with replacement."""
    rng = np.random.default_rng((seed, 2))
    models, patients = ratios.shape
    rates = []
    for _ in range(_BOOTSTRAPS):
        of_models = rng.multinomial(models, np.full(models, 1 / models))
        of_patients = rng.multinomial(patients, np.full(patients, 1 / patients))
        rates.append(true_positive_rate(ratios, member, np.outer(of_models, of_patients).astype(np.float64)))
    return float(np.quantile(rates, 1 - LIMIT))


def proven_epsilon(confidences: Scores, member: Membership, *, delta: float) -> float:
    """Lower bound of epsilon at `delta` with probability 1 - ALPHA, from guessing one half of the models."""
    models = len(member)
    halves = range(models // 2), range(models // 2, models)
    bounds = []
    for attacked, shadows in (halves, halves[::-1]):
        ratios = np.concatenate(
            [likelihood_ratios(confidences, member, attacked=m, shadows=shadows) for m in attacked]
        )
        tossed = member[list(attacked)].ravel()
        surest = np.argsort(-np.abs(ratios), kind="stable")[: int(GUESSED * len(ratios))]
        bounds.append(
            epsilon_lower_bound(
                canaries=len(ratios),
                guesses=len(surest),
                right=int(np.sum((ratios[surest] > 0) == tossed[surest])),
                delta=delta,
                confidence=1 - ALPHA / 2,
            )
        )
    return max(bounds)


def judge(confidences: Scores, member: Membership, *, delta: float, seed: int = 0) -> Attack:
    """Attack every model with all the others as shadow models."""
    models = range(len(member))
    ratios = np.stack(
        [
            likelihood_ratios(confidences, member, attacked=m, shadows=[s for s in models if s != m])
            for m in models
        ]
    )
    out = np.sort(ratios[~member])
    ranks = (np.searchsorted(out, ratios[member]) + np.searchsorted(out, ratios[member], side="right")) / 2
    return Attack(
        ratios=ratios,
        true_positives=true_positive_rate(ratios, member),
        true_positives_lower=lower_limit(ratios, member, seed=seed),
        auc=float(ranks.mean() / len(out)),
        epsilon_lower=proven_epsilon(confidences, member, delta=delta),
    )
