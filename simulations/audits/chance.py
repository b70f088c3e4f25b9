"""Probabilities that audits judge by."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from simulations.audits.finding import ALPHA

Vector = NDArray[np.float64]


def two_sided(z: float) -> float:
    """Probability that a standard normal is at least this far from 0.

    >>> round(two_sided(1.96), 3)
    0.05
    """
    return float(2 * stats.norm.sf(abs(z)))


def variance_p_value(values: Vector, *, stddev: float, freedom: int | None = None) -> float:
    """Two-sided chi-square probability of the values' mean square if they are N(0, stddev^2).

    `freedom` where a mean was taken off before; otherwise as many as there are values. 0.0 for nan.
    """
    statistic, count = float(np.sum(np.square(values))) / stddev**2, freedom or len(values)
    tail = min(stats.chi2.cdf(statistic, count), stats.chi2.sf(statistic, count))
    return float(np.nan_to_num(2 * tail))


def correlation_p_value(first: Vector, second: Vector) -> float:
    """Two-sided probability of the inner product of two equally long vectors if they are independent noise.

    0.0 where there is no noise at all.
    """
    lengths = float(np.sqrt((first @ first) * (second @ second)))
    return two_sided(float(first @ second) / lengths * np.sqrt(len(first))) if lengths > 0 else 0.0


def at_most(hits: int, trials: int, *, confidence: float) -> float:
    """Clopper-Pearson upper bound of a probability of which `hits` of `trials` were seen.

    >>> round(at_most(0, 59, confidence=0.95), 3)
    0.05
    """
    return 1.0 if hits == trials else float(special.betaincinv(hits + 1, trials - hits, confidence))


def least(p_values: ArrayLike) -> float:
    """The smallest of several p-values, corrected for their number (Bonferroni); at most 1."""
    values = np.atleast_1d(np.asarray(p_values, dtype=np.float64))
    return float(min(1.0, len(values) * np.nan_to_num(values).min()))


def suspicious(p_values: Mapping[str, float]) -> list[str]:
    """Names of those so small that all of them together give a false alarm with probability ALPHA."""
    return [name for name, p in p_values.items() if not p > ALPHA / len(p_values)]


def smallest_visible_deviation(count: int) -> float:
    """Relative deviation of a standard deviation that `count` numbers show in 999 of 1000 audits.

    >>> round(smallest_visible_deviation(20_000), 2)
    0.04
    """
    return float((stats.norm.isf(ALPHA / 2) + stats.norm.isf(1e-3)) / np.sqrt(2 * count))
