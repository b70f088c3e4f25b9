"""Counts about validation patients: which ones may be released together, and the noise that makes them so.

The unit is the patient: each validation patient counts once, however many the images. Two kinds of counts:

`confusion`: patients by true and predicted class, classes x classes, flattened row by row (true, predicted).
`scores`: for each scored class (only the finding where there are two) two histograms of the probability of
    that class over equal bins, first of the patients of the class, then of all others.

Other tasks count in the same two kinds. Several findings at once (K of them): `confusion` has for each a
table of its own, there or not by said or not, and `scores` the histograms of each. Ordered levels (K):
`confusion` is by true level and level said, and `scores` has histograms for each of the K - 1 questions
"beyond level k?", of their probability, first of the patients beyond it.

Guarantee: adding or removing one patient changes a number of cells by 1 each and no others: for each table of
`confusion` the one cell of what the patient has and is said to have, and for each pair of histograms of
`scores` the bin of its probability in the one of what it has. So the l2 sensitivity of a kind is the root of
its number of tables or pairs: 1 and sqrt(scored classes) for classes, sqrt(K) and sqrt(K) for K findings, 1
and sqrt(K - 1) for K levels. Both kinds are released as one Gaussian mechanism: the l2 sensitivity of all
counts is the root of the sum of the squares, and every cell
gets noise of standard deviation noise multiplier x that sensitivity. Counts and noise are whole numbers
(rounding is post-processing), so no low-order bits of a float tell what was added.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.messages import CONFUSION, SCORES
from common.multi_label_metrics import called
from common.ordinal_metrics import beyond, levels_of
from common.privacy.randomness import Stream
from common.task_kinds import CLASSIFICATION, MULTI_LABEL, ORDINAL

Counts = Mapping[str, list[float]]
"""Counts by kind, flattened; whole numbers, negative ones too where noise was added."""

KINDS = (CONFUSION, SCORES)
ROUNDING_VARIANCE = 1 / 12
"""What rounding to whole numbers adds to the variance of the noise (up to 1e-7, from deviation 1 on)."""


def checkpoint_rounds(rounds: int, checkpoints: int) -> tuple[int, ...]:
    """Rounds before the last after which the model is scored, evenly spread.

    Example: 20 rounds and 3 checkpoints: after rounds 5, 10 and 15.
    """
    spread = {rounds * number // (checkpoints + 1) for number in range(1, checkpoints + 1)}
    return tuple(sorted(spread - {0, rounds}))


@dataclass(frozen=True, kw_only=True)
class CountPlan:
    """Which counts are released together; public."""

    classes: int
    """Number of classes, at least 2."""
    score_bins: int
    """Bins of each histogram of scores."""
    kinds: tuple[str, ...]
    """`confusion`, `scores` or both, in this order."""
    task: str = CLASSIFICATION
    """What the classes are: one per patient, findings, or levels."""

    @classmethod
    def of(
        cls, kinds: Iterable[str], *, classes: int, score_bins: int, task: str = CLASSIFICATION
    ) -> "CountPlan":
        """The plan for these kinds, in any order. Raises ValueError for none or an unknown one."""
        wanted = set(kinds)
        if not wanted or not wanted <= set(KINDS):
            raise ValueError(f"expected some of {list(KINDS)}, got {sorted(wanted)}")
        ordered = tuple(kind for kind in KINDS if kind in wanted)
        return cls(classes=classes, score_bins=score_bins, kinds=ordered, task=task)

    @property
    def scored_classes(self) -> tuple[int, ...]:
        """Classes that have histograms: only the last of two, else every class; levels to lie beyond."""
        if self.task == ORDINAL:
            return tuple(range(self.classes - 1))
        if self.task == MULTI_LABEL:
            return tuple(range(self.classes))
        return (1,) if self.classes == 2 else tuple(range(self.classes))

    def shape(self, kind: str) -> tuple[int, ...]:
        """(true, predicted) for `confusion`; (scored classes, of the class or not, bins) for `scores`.

        Of findings `confusion` is (finding, there or not, said or not), not first.
        """
        if kind == CONFUSION:
            tables = (self.classes, 2, 2)
            return tables if self.task == MULTI_LABEL else (self.classes, self.classes)
        return (len(self.scored_classes), 2, self.score_bins)

    def length(self, kind: str) -> int:
        """Number of cells."""
        return math.prod(self.shape(kind))

    @property
    def l2_sensitivity(self) -> float:
        """Bound on the l2 norm of what one patient changes in all counts of the plan together.

        1 for `confusion` (sqrt(findings) of findings), sqrt(scored classes) for `scores`, the root of the sum
        of squares for both.
        """
        tables = self.classes if self.task == MULTI_LABEL else 1
        squares = {CONFUSION: tables, SCORES: len(self.scored_classes)}
        return math.sqrt(sum(squares[kind] for kind in self.kinds))

    def noise_stddev(self, noise_multiplier: float) -> float:
        """Standard deviation of the noise on every cell, before rounding to whole numbers."""
        return noise_multiplier * self.l2_sensitivity


def count_patients(
    plan: CountPlan, probabilities: npt.NDArray[Any], targets: npt.NDArray[Any]
) -> dict[str, list[float]]:
    """Count patients, one row each: `probabilities` (patients, classes), `targets` as the task's. Private.

    A tie between classes goes to the lower label. A probability that is not a number counts as 0, so that
    also a model that diverged counts each patient once.
    """
    said = np.clip(np.nan_to_num(probabilities.astype(np.float64), nan=0.0), 0.0, 1.0)
    counts: dict[str, npt.NDArray[np.int64]] = {
        kind: np.zeros(plan.shape(kind), np.int64) for kind in plan.kinds
    }
    if CONFUSION in counts:
        np.add.at(counts[CONFUSION], _cells(plan, said, targets), 1)
    if SCORES in counts:
        scores = np.clip(beyond(said), 0.0, 1.0) if plan.task == ORDINAL else said
        bins = np.minimum((scores * plan.score_bins).astype(np.int64), plan.score_bins - 1)
        for place, label in enumerate(plan.scored_classes):
            is_other = (~_is_of(plan, targets, label)).astype(np.int64)
            np.add.at(counts[SCORES][place], (is_other, bins[:, label]), 1)
    return {kind: [float(count) for count in array.ravel()] for kind, array in counts.items()}


def _cells(
    plan: CountPlan, said: npt.NDArray[np.float64], targets: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], ...]:
    """Where each patient counts in `confusion`: one cell, or one in the table of each finding."""
    if plan.task == MULTI_LABEL:
        findings = np.broadcast_to(np.arange(plan.classes), targets.shape)
        return findings, targets, called(said).astype(np.int64)
    return targets, levels_of(said) if plan.task == ORDINAL else said.argmax(axis=1)


def _is_of(plan: CountPlan, targets: npt.NDArray[Any], label: int) -> npt.NDArray[np.bool_]:
    """(patients,) whether each is of a scored class: has the finding, or lies beyond the level."""
    if plan.task == MULTI_LABEL:
        return np.asarray(targets[:, label] == 1)
    return np.asarray(targets > label if plan.task == ORDINAL else targets == label)


def noised(
    plan: CountPlan, counts: Counts, *, noise_multiplier: float, stream: Stream
) -> dict[str, list[float]]:
    """Add to every cell Gaussian noise of `plan.noise_stddev`, rounded to a whole number.

    Counts are whole, so this is the Gaussian mechanism followed by rounding. Below 0 nothing is cut off:
    sums over hospitals stay unbiased.
    """
    stddev = plan.noise_stddev(noise_multiplier)
    result = {}
    for kind in plan.kinds:
        noise = np.rint(stddev * stream.normal(plan.length(kind)))
        result[kind] = [float(count) for count in np.asarray(counts[kind], np.float64) + noise]
    return result


def patient_rows(
    offsets: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], *, most: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first `most` rows of each patient in table order, and whose each is (0, 1, ... in order).

    Patient p owns `rows[offsets[p]:offsets[p + 1]]`. The choice looks at no content and stays.
    """
    kept = np.minimum(np.diff(offsets), most)
    patients = np.repeat(np.arange(len(kept), dtype=np.int64), kept)
    ranks = np.arange(len(patients), dtype=np.int64) - np.repeat(np.cumsum(kept) - kept, kept)
    return rows[offsets[patients] + ranks], patients


def patient_means(
    probabilities: npt.NDArray[Any], patients: npt.NDArray[np.int64], *, num_patients: int
) -> npt.NDArray[np.float64]:
    """Mean over the rows of each patient, (num_patients, classes); NaN for a patient without rows."""
    sums = np.zeros((num_patients, probabilities.shape[1]))
    np.add.at(sums, patients, probabilities)
    rows = np.bincount(patients, minlength=num_patients)[:, None]
    return np.divide(sums, rows, out=np.full_like(sums, np.nan), where=rows > 0)


def patient_labels(
    targets: npt.NDArray[np.int64], patients: npt.NDArray[np.int64], *, num_patients: int, classes: int
) -> npt.NDArray[np.int64]:
    """One label per patient: the one that most of the patient's images carry; a tie goes to the higher one.

    With two classes the higher one is the finding: seen in half of the images, the patient has it. Targets
    (rows, findings) give (patients, findings), each finding by itself in that way; none without a row.
    """
    if targets.ndim == 2:
        seen = np.zeros((num_patients, classes), np.int64)
        np.add.at(seen, patients, targets)
        rows = np.bincount(patients, minlength=num_patients)[:, None]
        return np.asarray((2 * seen >= rows) & (rows > 0), np.int64)
    votes = np.zeros((num_patients, classes), np.int64)
    np.add.at(votes, (patients, targets), 1)
    return np.asarray(classes - 1 - votes[:, ::-1].argmax(axis=1), np.int64)
