"""Probabilities corrected by how often it was so among validation patients; two classes, noised counts only.

Isotonic regression over the bins of the released histograms: post-processing, it costs no privacy. Counts are
first weighed as in `common.operating_point`. Source: Zadrozny and Elkan, Transforming classifier scores into
accurate multiclass probability estimates, KDD 2002.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from common.operating_point import believed, rates_of

FloatArray = npt.NDArray[np.float64]


def fit(histograms: FloatArray, edges: FloatArray, *, deviation: float) -> dict[str, Any] | None:
    """The map as points `said` and `so`, both rising; None where noise alone could be all there is.

    `histograms` is (2, bins), patients with the finding and others; `edges` (bins + 1,) bounds the bins.
    """
    from sklearn.isotonic import IsotonicRegression

    if rates_of(histograms, deviation=deviation) is None:
        return None
    counts = believed(histograms, deviation=deviation).mean(axis=0)
    totals = counts.sum(axis=0)
    occupied = totals > 0
    said = (edges[1:] + edges[:-1])[occupied] / 2
    shares = counts[0, occupied] / totals[occupied]
    rising = IsotonicRegression(y_min=0.0, y_max=1.0).fit(said, shares, sample_weight=totals[occupied])
    return {
        "method": "isotonic regression on noised validation counts",
        "said": [float(place) for place in said],
        "so": [float(share) for share in rising.predict(said)],
    }


def require_map(points: Any) -> None:
    """Raise ValueError unless `points` is None or a map that `recalibrated` can follow."""
    if points is None:
        return
    sides = [np.asarray(points[name], np.float64) for name in ("said", "so")]
    if any(side.ndim != 1 or side.shape != sides[0].shape or not len(side) for side in sides):
        raise ValueError("recalibration needs as many points said as so")
    if not all(((side >= 0) & (side <= 1)).all() and (np.diff(side) >= 0).all() for side in sides):
        raise ValueError("the points of recalibration must rise within 0 to 1")


def recalibrated(probabilities: FloatArray, points: Mapping[str, Any]) -> FloatArray:
    """(rows, 2) probabilities by the map `fit` has made, straight lines between its points; NaN stays NaN."""
    finding = np.interp(probabilities[:, 1], points["said"], points["so"])
    finding = np.where(np.isfinite(probabilities[:, 1]), finding, np.nan)
    return np.stack([1 - finding, finding], axis=1)
