"""Sampling audits: every patient enters a step with the plan's probability, on their own, every step anew.

White-box: the rows whose loss is asked for. Black-box: each patient lights a pixel of their own, so that an
update with hardly any noise shows who took part, and how often. Shuffled batches that are accounted as
Poisson samples are the field's most frequent false claim.
Source: Beltran et al., Towards Efficient and Scalable Training of DP Deep Learning, arXiv 2406.17298.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from common.examples import Examples
from common.privacy.randomness import Stream
from common.tasks import Classification
from simulations.audits.chance import least, suspicious, two_sided
from simulations.audits.finding import Finding
from simulations.audits.probe import (
    along_lit_pixels,
    blank_network,
    lit_films,
    make_plan,
    noisy_sums,
    production_randomness,
)

SIDE, CAP = 4, 2
LENGTHS = (1, 5, 2, 1, 3) * 8
"""Images of each patient; at most CAP of them enter a step."""
UNITS = len(LENGTHS)
UNIT_OF_ROW = np.repeat(np.arange(UNITS), LENGTHS)
RATE = 0.3
SMALL_RATE = 0.02
_LAGS = range(1, 11)

Taken = NDArray[np.bool_]


class _NotingTask(Classification):
    """Targets are 2 * (row + 1) + label; notes the rows of every step. Target 0 only fills a chunk up."""

    entered: list[list[NDArray[np.int64]]]

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.requires_grad:  # the guard's probe does not
            rows = (targets // 2).numpy() - 1
            self.entered[-1].append(rows[rows >= 0])
        return super().losses(outputs, targets % 2)


class _Noting:
    """Production randomness that opens a new list of rows when a step begins."""

    def __init__(self, entered: list[list[NDArray[np.int64]]]) -> None:
        self._source = production_randomness()
        self._entered = entered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def stream(self, *, purpose: Any, round_number: int, step: int, part: int = 0) -> Stream:
        if purpose == "sampling":
            self._entered.append([])
        return self._source.stream(purpose=purpose, round_number=round_number, step=step, part=part)


def entered_rows(*, steps: int, rounds: int = 1, rate: float = RATE, physical_batch_size: int = 256) -> Taken:
    """Which rows entered which step of `train_privately`: bool (steps * rounds, rows)."""
    task = _NotingTask(classes=("negative", "positive"))
    noted: list[list[NDArray[np.int64]]] = []
    task.__dict__["entered"] = noted  # a task is frozen
    images = np.random.default_rng(0).integers(0, 256, (len(UNIT_OF_ROW), 1, SIDE, SIDE), dtype=np.uint8)
    examples = Examples(
        inputs={"image": images},
        targets=2 * np.arange(1, len(UNIT_OF_ROW) + 1) + UNIT_OF_ROW % 2,
        units=UNIT_OF_ROW,
        unit_ids=tuple(str(number) for number in range(UNITS)),
    )
    plan = make_plan(
        sampling_rate=rate, noise_multiplier=1.5, steps=steps, enrolled_units=UNITS, max_rows_per_unit=CAP
    )
    for number in range(1, rounds + 1):
        noisy_sums(
            model=blank_network(SIDE),
            examples=examples,
            plan=plan,
            task=task,
            round_number=number,
            physical_batch_size=physical_batch_size,
            randomness=_Noting(noted),
        )
    counts = np.zeros((steps * rounds, len(UNIT_OF_ROW)), dtype=np.int64)
    for step, parts in enumerate(noted[: steps * rounds]):
        for part in parts:
            np.add.at(counts[step], part, 1)
    if len(noted) != steps * rounds or counts.max() > 1:
        raise AssertionError("a row entered a step twice, or steps ran that the plan does not have")
    return counts.astype(bool)


def units_of(rows: Taken) -> Taken:
    """Whose rows they are: bool (steps, units) of bool (steps, rows)."""
    return np.stack([rows[:, unit == UNIT_OF_ROW].any(axis=1) for unit in range(UNITS)], axis=1)


def poisson_p_values(units: Taken, rate: float) -> dict[str, float]:
    """p-values of what Poisson sampling with `rate` promises about bool (steps, units)."""
    steps, count = units.shape
    each = steps * rate * (1 - rate)
    per_unit = float(np.sum((units.sum(axis=0) - steps * rate) ** 2) / each)
    centred = (units - rate) / np.sqrt(rate * (1 - rate))
    pairs = (centred.T @ centred / np.sqrt(steps))[np.triu_indices(count, 1)]
    overlaps = [
        float(np.sum(centred[:-lag] * centred[lag:])) / np.sqrt((steps - lag) * count) for lag in _LAGS
    ]
    spread = np.sqrt(_variance_of_squares(steps, count, rate))
    return {
        "rate": float(stats.binomtest(int(units.sum()), units.size, rate).pvalue),
        "each patient's share": min(
            1.0, 2 * min(stats.chi2.sf(per_unit, count), stats.chi2.cdf(per_unit, count))
        ),
        "batch sizes are binomial": _fit(units.sum(axis=1), count, rate),
        "patients are independent": two_sided((np.sum(pairs**2) - len(pairs)) / spread),
        "steps are independent": least([two_sided(z) for z in overlaps]),
    }


def choice_p_value(rows: Taken) -> float:
    """Of a patient's many images any CAP enter a step with equal chance, and others in the next step."""
    p_values = []
    for unit, length in enumerate(LENGTHS):
        mine = rows[:, unit == UNIT_OF_ROW]
        mine = mine[mine.any(axis=1)]
        if (mine.sum(axis=1) != min(length, CAP)).any():
            return 0.0
        if length > CAP:
            chosen = np.stack([np.flatnonzero(row) for row in mine])
            counts = np.zeros((length, length))
            np.add.at(counts, (chosen[:, 0], chosen[:, 1]), 1)
            p_values.append(float(stats.chisquare(counts[np.triu_indices(length, 1)]).pvalue))
            centred = mine - CAP / length
            variance = CAP / length * (1 - CAP / length) * length
            z = np.sum(centred[:-1] * centred[1:]) / (variance / np.sqrt(length - 1)) / np.sqrt(len(mine) - 1)
            p_values.append(two_sided(float(z)))
    return least(p_values)


def audit_sampling(*, steps: int = 6000, rounds: int = 1500) -> Finding:
    """White-box: who enters the steps of one long round, of many rounds in chunks, and at a small rate."""
    rows = entered_rows(steps=steps)
    p_values = poisson_p_values(units_of(rows), RATE) | {"choice of images": choice_p_value(rows)}
    chunked = poisson_p_values(units_of(entered_rows(steps=1, rounds=rounds, physical_batch_size=3)), RATE)
    p_values |= {f"{name}, from round to round": p for name, p in chunked.items()}
    rare = units_of(entered_rows(steps=steps // 2, rate=SMALL_RATE))
    # Two patients rarely enter together here: sums over pairs are then too far from normal for p < 1e-6.
    alone = {name: p for name, p in poisson_p_values(rare, SMALL_RATE).items() if "independent" not in name}
    p_values |= {f"{name}, small rate": p for name, p in alone.items()}
    empty = int(np.sum(~rare.any(axis=1)))
    p_values["empty steps"] = float(stats.binomtest(empty, len(rare), (1 - SMALL_RATE) ** UNITS).pvalue)
    numbers = {
        "steps": len(rows) + rounds + len(rare),
        "share of empty steps at a small rate": empty / len(rare),
    }
    return _judged("sampling", p_values, numbers)


def participations(*, rounds: int, steps: int, rate: float = RATE, units: int = UNITS) -> NDArray[np.float64]:
    """In how many steps of a round each patient took part, by the update: float (rounds, units)."""
    side = int(np.ceil(np.sqrt(units)))
    examples = lit_films(np.arange(units), side)
    plan = make_plan(sampling_rate=rate, steps=steps, enrolled_units=units)
    sums = [
        noisy_sums(model=blank_network(side), examples=examples, plan=plan, round_number=number)
        for number in range(1, rounds + 1)
    ]
    return np.stack([along_lit_pixels(row)[:units] for row in sums])


def audit_sampling_black_box(*, rounds: int = 1200, long_rounds: int = 150, steps: int = 12) -> Finding:
    """Black-box: who took part in rounds of one step, and how often in rounds of several."""
    single = participations(rounds=rounds, steps=1)
    several = participations(rounds=long_rounds, steps=steps)
    # One patient alone: an empty batch must stay empty.
    lonely = participations(rounds=rounds // 2, steps=1, rate=0.2, units=1)
    p_values = poisson_p_values(single > 0.5, RATE)
    counts = np.rint(several)
    p_values[f"times in {steps} steps are binomial"] = _binomial_p_value(counts, steps, RATE)
    p_values[f"rate over {steps} steps"] = float(
        stats.binomtest(int(np.clip(counts, 0, steps).sum()), counts.size * steps, RATE).pvalue
    )
    p_values["rate of a patient alone"] = float(
        stats.binomtest(int(np.sum(lonely > 0.5)), lonely.size, 0.2).pvalue
    )
    off = max(float(np.max(np.abs(seen - np.rint(seen)))) for seen in (single, several, lonely))
    most = max(float(single.max()), float(several.max()) / steps, float(lonely.max()))
    # A patient's part is C or nothing; what is left of one step and enters the next would be 2 C.
    whole = {} if off < 0.01 and most < 1.01 else {"a patient's part is C or nothing": 0.0}
    numbers = {"rounds": rounds + long_rounds + rounds // 2, "largest part of a patient over C": most}
    return _judged("sampling, black box", p_values | whole, numbers, black_box=True)


def _binomial_p_value(counts: NDArray[np.float64], trials: int, rate: float) -> float:
    """Two-sided probability of the spread of binomial counts: shuffling takes everybody equally often."""
    fractions = stats.binom.pmf(np.arange(trials + 1), trials, rate)
    values = (np.arange(trials + 1) - trials * rate) ** 2
    mean = float(fractions @ values)
    variance = float(fractions @ values**2) - mean**2
    seen = (counts - trials * rate) ** 2
    return two_sided((float(seen.sum()) - counts.size * mean) / np.sqrt(counts.size * variance))


def _variance_of_squares(steps: int, count: int, rate: float) -> float:
    """Variance of the sum over pairs of squared correlations, times steps, of independent patients.

    Pairs that share a patient are not independent, which matters for small rates.
    """
    fourth = (1 - 3 * rate * (1 - rate)) / (rate * (1 - rate))  # of a centred inclusion over its deviation
    number = count * (count - 1) / 2
    alone = (3 * (steps - 1) + fourth**2) / steps - 1
    return float(number * (alone + 2 * (count - 2) * (fourth - 1) / steps))


def _fit(sizes: NDArray[np.int64], count: int, rate: float) -> float:
    """Chi-square of the batch sizes against the binomial distribution, rare sizes taken together."""
    low, high = stats.binom.ppf([0.02, 0.98], count, rate).astype(int)
    observed = np.bincount(np.clip(sizes, low, high), minlength=high + 1)[low:]
    middle = stats.binom.pmf(np.arange(low + 1, high), count, rate)
    expected = [stats.binom.cdf(low, count, rate), *middle, stats.binom.sf(high - 1, count, rate)]
    return float(stats.chisquare(observed, len(sizes) * np.array(expected)).pvalue)


def _judged(
    audit: str, p_values: dict[str, float], numbers: dict[str, float], *, black_box: bool = False
) -> Finding:
    wrong = suspicious(p_values)
    said = f"Patients enter steps like independent draws with the accounted rate ({len(p_values)} checks)."
    if wrong:
        said = f"Who enters a step is not what is accounted: {', '.join(wrong)}."
    numbers |= {f"p, {name}": p for name, p in p_values.items()}
    return Finding(audit=audit, passed=not wrong, said=said, numbers=numbers, black_box=black_box)
