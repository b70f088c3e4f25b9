"""Ratios of noisy sums: defined only where the divisor stands out from its own noise."""

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

LEAST_DEVIATIONS = 2.0
"""A sum of noisy cells must exceed so many standard deviations of its noise."""


def least(deviation: float, cells: int) -> float:
    """What a sum of so many noisy cells must exceed to tell that anybody is in it."""
    return LEAST_DEVIATIONS * deviation * math.sqrt(cells)


def ratio(numerator: FloatArray, denominator: FloatArray, above: float) -> FloatArray:
    """Quotient where the denominator exceeds `above` (and 0), else NaN."""
    nowhere = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=nowhere, where=denominator > max(above, 0.0))
    return nowhere


def mean_of_defined(values: FloatArray) -> FloatArray:
    """Mean over the second axis of the entries that are not NaN; NaN where all are."""
    return ratio(np.nansum(values, axis=1), np.isfinite(values).sum(axis=1).astype(np.float64), 0.0)
