"""What a comparison found: scores of every way with intervals, and whether the federation pays.

All ways are scored on the same held-back patients, so their differences are bootstrapped in pairs: one draw
of patients scores every model. Pure functions; no file, no process.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import metrics
from common.pages.html import figure, interval
from common.tasks import Task
from simulations.task_scoring import has_own_scores, task_samples
from simulations.ways import Way

SCORES = ("auc", "accuracy", "recall", "f1")
RESAMPLES = 1000
BASELINES_ARE = "without privacy, never leaves this machine"

FloatArray = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One way that was carried out, or why it was not."""

    way: Way
    status: str
    """Status of its run; `failed` without one."""
    problem: str = ""
    private: bool = False
    """Whether its run claims privacy; none does in reproducible mode."""
    rounds: int | None = 0
    """None where there are no rounds."""
    seconds: float | None = None
    epsilon_spent: float | None = None
    """Largest over the hospitals."""
    metrics: Mapping[str, float | None]
    ci95: Mapping[str, Interval | None]
    samples: Mapping[str, FloatArray]
    """(resamples,) of each score, over the same draws of patients for every way; NaN where undefined."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    title: str
    metrics: Mapping[str, float | None]
    ci95: Mapping[str, Interval | None]
    rounds: int | None
    seconds: float | None
    note: str = ""
    heading: bool = False
    """Whether it only names the rows below it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A federated way against hospitals alone, by AUC on the same test patients."""

    way: str
    against: str
    difference: float
    ci95: Interval

    @property
    def beats(self) -> bool:
        """Whether the federation is better beyond chance."""
        return self.ci95[0] > 0

    @property
    def text(self) -> str:
        """The finding in words; nothing is beaten whose interval holds zero."""
        judged = "beats" if self.beats else "does not beat"
        worse = " (it is worse)" if self.ci95[1] < 0 else ""
        return (
            f"{self.way} {judged} {self.against}{worse}: AUC difference {figure(self.difference)}, "
            f"95 % interval {interval(self.ci95)}"
        )


def score(
    probabilities: FloatArray,
    targets: NDArray[np.int64],
    units: NDArray[np.int64],
    *,
    seed: int,
    task: Task | None = None,
) -> tuple[dict[str, float | None], dict[str, FloatArray]]:
    """Scores of one model and their bootstrap samples by patient; the same seed draws the same patients.

    Without a task it is a classification; a score that a task does not have is None.
    """
    if task is not None and has_own_scores(task):
        found = task.metrics(probabilities, targets)
        drawn = task_samples(task, probabilities, targets, units, seed=seed, resamples=RESAMPLES)
        undefined = np.full(RESAMPLES, np.nan)
        return {name: found.get(name) for name in SCORES}, {n: drawn.get(n, undefined) for n in SCORES}
    whole = metrics.classification_metrics(probabilities, targets)
    return {name: whole[name] for name in SCORES}, metrics.bootstrap_samples(
        probabilities, targets, units=units, metrics=SCORES, resamples=RESAMPLES, seed=seed
    )


def interval_of(samples: FloatArray) -> Interval | None:
    """Percentile interval at 95 %; None where the score is undefined in more than 5 % of the draws."""
    defined = samples[np.isfinite(samples)]
    if len(defined) < 0.95 * len(samples):
        return None
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def rows_of(trained: Sequence[Trained]) -> list[Row]:
    """The table: every way in order, and before the hospitals alone their mean, best and worst.

    Baselines stand last under a heading; of their hospitals alone only mean and best are shown.
    """
    rows: list[Row] = []
    for item in trained:
        if item.way.baseline and not any(row.heading for row in rows):
            heading = f"Classical baselines, {BASELINES_ARE}"
            rows.append(Row(title=heading, metrics={}, ci95={}, rounds=None, seconds=None, heading=True))
        group = alone(trained, epsilon=item.way.epsilon, baseline=item.way.baseline)
        if len(group) > 1 and any(item is one for one in group):
            if item is group[0]:
                rows += _alone_summary(group)
            if item.way.baseline:
                continue
        rows.append(
            Row(
                title=item.way.title,
                metrics=item.metrics,
                ci95=item.ci95,
                rounds=item.rounds if item.samples else None,
                seconds=item.seconds,
                note=item.problem or ("" if item.status == "completed" else item.status),
            )
        )
    return rows


def alone(trained: Sequence[Trained], *, epsilon: float | None, baseline: str = "") -> list[Trained]:
    """The hospitals alone at one epsilon (None: without privacy) by one method that have scores."""
    same = [t for t in trained if t.way.epsilon == epsilon and t.way.baseline == baseline]
    return [t for t in same if t.way.kind == "alone" and t.samples]


def verdicts_of(trained: Sequence[Trained]) -> list[Verdict]:
    """Each federated way against the mean and the best hospital alone.

    Alone means without privacy, since what stays in the house needs none; and alone at the same epsilon,
    where that was trained. The best hospital is chosen by its test AUC, which favours it a little.
    """
    verdicts = []
    for item in trained:
        if item.way.kind != "federated" or not item.samples:
            continue
        for epsilon in dict.fromkeys((None, item.way.epsilon)):
            group = [t for t in alone(trained, epsilon=epsilon) if t.metrics["auc"] is not None]
            verdicts += _against(item, group, epsilon)
    return verdicts


def _against(item: Trained, group: Sequence[Trained], epsilon: float | None) -> list[Verdict]:
    own = item.metrics["auc"]
    if own is None or not group:
        return []
    under = "" if epsilon is None else f" at epsilon {epsilon:g}"
    best = max(group, key=_auc)
    mean = np.mean([t.samples["auc"] for t in group], axis=0)
    rivals = (
        (f"the mean hospital alone{under}", statistics.fmean(_auc(t) for t in group), mean),
        (f"the best hospital alone{under} ({best.way.members[0]})", _auc(best), best.samples["auc"]),
    )
    verdicts = []
    for name, value, samples in rivals:
        bounds = interval_of(item.samples["auc"] - samples)
        if bounds is not None:
            verdicts.append(Verdict(way=item.way.title, against=name, difference=own - value, ci95=bounds))
    return verdicts


def _alone_summary(group: Sequence[Trained]) -> list[Row]:
    way = group[0].way
    privacy = "" if way.epsilon is None else f", epsilon {way.epsilon:g}"
    method = f"{way.baseline}, " if way.baseline else ""
    mean = Row(
        title=f"{method}alone, mean of {len(group)}{privacy}",
        metrics={name: _mean([t.metrics[name] for t in group]) for name in SCORES},
        ci95={name: interval_of(np.mean([t.samples[name] for t in group], axis=0)) for name in SCORES},
        rounds=None,
        seconds=statistics.fmean(t.seconds or 0.0 for t in group),
    )
    ranked = sorted(group, key=_auc)
    named = (("best", ranked[-1]), ("worst", ranked[0]))[: 1 if way.baseline else 2]
    return [
        mean,
        *(
            Row(
                title=f"{method}alone, {which}{privacy} ({t.way.members[0]})",
                metrics=t.metrics,
                ci95=t.ci95,
                rounds=t.rounds,
                seconds=t.seconds,
            )
            for which, t in named
        ),
    ]


def _auc(trained: Trained) -> float:
    value = trained.metrics["auc"]
    return -1.0 if value is None else value


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined else None


def to_dict(trained: Sequence[Trained]) -> dict[str, Any]:
    """`ways` and `verdicts` as plain values, for comparison.json."""
    return {
        "ways": [
            {
                "name": t.way.name,
                "title": t.way.title,
                "kind": t.way.kind,
                "baseline": t.way.baseline or None,
                "note": BASELINES_ARE if t.way.baseline else "",
                "hospitals": list(t.way.members),
                "private": t.private,
                "epsilon": t.way.epsilon,
                "epsilon_spent": t.epsilon_spent,
                "status": t.status,
                "problem": t.problem,
                "rounds": t.rounds,
                "seconds": t.seconds,
                "metrics": dict(t.metrics),
                "ci95": {name: bounds and list(bounds) for name, bounds in t.ci95.items()},
            }
            for t in trained
        ],
        "verdicts": [
            {
                "way": v.way,
                "against": v.against,
                "auc_difference": v.difference,
                "ci95": list(v.ci95),
                "beats": v.beats,
                "text": v.text,
            }
            for v in verdicts_of(trained)
        ],
    }
