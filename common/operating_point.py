"""The threshold from which on a finding is called, chosen on noised histograms of scores; two classes only.

Post-processing of released counts (`common.evaluation`): it costs no privacy beyond what they have cost.

Under noise the edge at which the noised counts look best is often far from the best one, because some edge is
always lucky. So the counts are first weighed against what is known of them: they are whole, none is below 0,
and the noise has a public size. Sensitivity and specificity at each edge are means over draws of what each
count may have been: the posterior of a count under the scale-free prior 1 / (1 + count). Without noise
nothing is drawn and the counts are taken as they are. `docs/evaluation.md` has what this brings.

Source of the criterion: Youden, Index for rating diagnostic tests, Cancer 3 (1950).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

BALANCED = "balanced"
_DRAWS = 500
_SEED = 20_26
_LEAST_DEVIATIONS = 2.0
_REACH = 8.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What is believed of the released counts at each inner edge, from the lowest edge to the highest."""

    sensitivity: FloatArray
    """(draws, edges) share of the patients with the finding at or above the edge."""
    specificity: FloatArray
    """(draws, edges) share of the others below it."""

    @property
    def youden(self) -> FloatArray:
        """Sensitivity + specificity - 1, (draws, edges)."""
        return self.sensitivity + self.specificity - 1


def choose(
    histograms: FloatArray, edges: FloatArray, *, deviation: float, rule: str = BALANCED
) -> dict[str, Any] | None:
    """The operating point by `rule`, None where the noise leaves no reason to choose one.

    `histograms` is (2, bins), patients with the finding and others; `edges` (bins + 1,) bounds the bins;
    `deviation` is the standard deviation of the noise on each cell. The result has `threshold` (call the
    finding where its probability is at least this), the `rule`, the `source` in words, `sensitivity` and
    `specificity` of the noised counts, and `noise`, how unsure their sum is.
    """
    rates = rates_of(histograms, deviation=deviation)
    if rule[0] in "0.":
        return _fixed(float(rule), histograms, edges, rates)
    if rates is None:
        return None
    sensitivity, youden = rates.sensitivity.mean(axis=0), rates.youden.mean(axis=0)
    if rule == BALANCED:
        best = int(youden.argmax())
        source = "noised validation counts, largest sensitivity + specificity - 1 over bin edges"
    else:
        wanted = float(rule.split(":")[1])
        reached = np.flatnonzero(sensitivity >= wanted)
        if not len(reached):
            return None
        best = int(reached[-1])
        source = f"noised validation counts, highest bin edge with sensitivity {wanted:g}"
    noise = float(rates.youden[:, best].std())
    if not youden[best] > _LEAST_DEVIATIONS * noise:
        return None
    return {"threshold": float(edges[1 + best]), "rule": rule, "source": source} | _stated(
        histograms, rates, best
    )


def rates_of(histograms: FloatArray, *, deviation: float) -> Rates | None:
    """Sensitivity and specificity at each inner edge; None where noise alone could be all there is."""
    cells = histograms.shape[1]
    if (histograms.sum(axis=1) <= _LEAST_DEVIATIONS * deviation * np.sqrt(cells)).any():
        return None
    drawn = believed(histograms, deviation=deviation)
    above = drawn[:, :, ::-1].cumsum(axis=2)[:, :, -2::-1]
    shares = above / np.maximum(drawn.sum(axis=2), 1.0)[:, :, None]
    return Rates(sensitivity=shares[:, 0], specificity=1 - shares[:, 1])


def believed(histograms: FloatArray, *, deviation: float) -> FloatArray:
    """(draws, 2, bins): whole counts that may lie behind the noised ones; drawn from a fixed seed."""
    if not deviation:
        return np.asarray(histograms[None], np.float64)
    noised = np.asarray(histograms, np.float64).ravel()
    reach = _REACH * deviation
    # What the noise can have made of `count` patients, within eight deviations; (cells, counts)
    counts = np.maximum(np.floor(noised - reach), 0.0)[:, None] + np.arange(math.ceil(2 * reach) + 2)
    logarithms = -(((noised[:, None] - counts) / deviation) ** 2) / 2 - np.log1p(counts)
    weights = np.exp(logarithms - logarithms.max(axis=1, keepdims=True)).cumsum(axis=1)
    uniform = np.random.Generator(np.random.PCG64(_SEED)).random((len(noised), _DRAWS))
    drawn = [
        one[np.searchsorted(weight, weight[-1] * at)]
        for one, weight, at in zip(counts, weights, uniform, strict=True)
    ]
    return np.stack(drawn, axis=1).reshape(_DRAWS, *histograms.shape)


def _fixed(
    threshold: float, histograms: FloatArray, edges: FloatArray, rates: Rates | None
) -> dict[str, Any]:
    """A threshold that the plan names; what the counts say of it where it is a bin edge."""
    point: dict[str, Any] = {"threshold": threshold, "rule": f"{threshold:g}", "source": "fixed in the plan"}
    at = np.flatnonzero(np.isclose(edges[1:-1], threshold))
    if rates is None or not len(at):
        return point | {"sensitivity": None, "specificity": None, "noise": None}
    return point | _stated(histograms, rates, int(at[0]))


def _stated(histograms: FloatArray, rates: Rates, edge: int) -> dict[str, Any]:
    """Rates of the noised counts themselves: unlike the means over what is believed, they are unbiased."""
    above = histograms[:, edge + 1 :].sum(axis=1) / histograms.sum(axis=1)
    return {
        "sensitivity": float(np.clip(above[0], 0, 1)),
        "specificity": float(np.clip(1 - above[1], 0, 1)),
        "noise": float(rates.youden[:, edge].std()),
    }
