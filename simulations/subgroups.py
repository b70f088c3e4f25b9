"""Scores by sex and age of the simulation's own test patients; small groups are never computed.

Local and of simulations only: no hospital is asked, and nothing of it leaves the machine by itself. A group
of fewer than LEAST patients is suppressed: it has no number, not even its size. Where a total would tell what
is hidden (one hidden group beside shown ones, or hidden groups that are too few together), the next smallest
group is hidden too. Within a shown group the same holds for the patients of each class: where there are too
few, the rates that are about a class are left out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import metrics
from common.errors import ConfigError

LEAST = 10
"""Patients that a group, or a class within a group, must have to be shown; public."""
SEXES = ("female", "male")
BANDS = ("under 18", "18 to 39", "40 to 64", "65 and over")
UNKNOWN = "unknown"
GROUPS: Mapping[str, tuple[str, ...]] = {"sex": SEXES, "age": BANDS}
"""By stratum, the names of its groups in order; -1 is UNKNOWN."""

_FIRST_YEARS = (18, 40, 65)
_USUAL = {
    "sex": ("sex", "gender", "patientsex", "patientgender"),
    "age": ("age", "patientage", "ageyears", "ageinyears", "ageatstudy"),
}
_SEX_OF = {"f": 0, "female": 0, "woman": 0, "w": 0, "m": 1, "male": 1, "man": 1}
_AGE = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*([ymwd]?)", re.IGNORECASE)
_YEARS = {"": 1.0, "y": 1.0, "m": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25}
_OLDEST = 120
_RESAMPLES = 500


def strata_of(
    groups: Mapping[str, Sequence[str]], *, columns: Mapping[str, str]
) -> dict[str, NDArray[np.int64]]:
    """(rows,) group of each row by stratum, -1 where it is not known; strata without a column are left out.

    `groups` are the manifest's further columns; `columns` names the one of a stratum, empty finds a usual
    name. Raises ConfigError for a named column that is not there.
    """
    by_plain = {_plain(name): name for name in reversed(list(groups))}
    read = {"sex": _sex_of, "age": _band_of}
    found = {}
    for stratum, usual in _USUAL.items():
        named = columns.get(stratum, "")
        wanted = (_plain(named),) if named else usual
        column = next((by_plain[name] for name in wanted if name in by_plain), None)
        if column is None and named:
            raise ConfigError(
                f"the data have no column {named!r} for the {stratum}",
                why=f"columns are: {', '.join(sorted(groups)) or 'none'}",
                fix=f"name one of them with --{stratum}-column",
            )
        if column is not None:
            found[stratum] = np.array([read[stratum](text) for text in groups[column]], np.int64)
    return found


def suppressed(counts: Sequence[int], *, least: int = LEAST) -> list[bool]:
    """Which cells of a total must be hidden: those below `least`, and those that would give them away.

    Example: of 4, 30 and 12 the first is too small, and 12 is hidden so that the total does not tell it.
    """
    hidden = [count < least for count in counts]
    while any(hidden) and not all(hidden):
        together = sum(count for count, is_hidden in zip(counts, hidden, strict=True) if is_hidden)
        if sum(hidden) > 1 and together >= least:
            break
        shown = [place for place, is_hidden in enumerate(hidden) if not is_hidden]
        hidden[min(shown, key=lambda place: counts[place])] = True
    return hidden


def subgroup_scores(
    probabilities: NDArray[np.float64],
    decisions: NDArray[np.float64],
    targets: NDArray[np.int64],
    *,
    units: NDArray[np.int64],
    strata: Mapping[str, NDArray[np.int64]],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One line per group that has anybody: `by`, `group`, and its numbers unless it is suppressed.

    `decisions` is (rows, classes), 1 for the class that is called. Lines of hidden groups hold no number;
    lines with too few patients of a class hold `patients` and `accuracy` only.
    """
    lines = []
    for stratum, of_row in strata.items():
        names = (*GROUPS[stratum], UNKNOWN)
        places = [place for place in (*range(len(names) - 1), -1) if (of_row == place).any()]
        rows = [np.flatnonzero(of_row == place) for place in places]
        hidden = suppressed([_patients(units[mine]) for mine in rows])
        few = _too_few_of_a_class([(units[mine], targets[mine]) for mine in rows], probabilities.shape[1])
        for place, mine, is_hidden, has_few in zip(places, rows, hidden, few, strict=True):
            line: dict[str, Any] = {"by": stratum, "group": names[place], "suppressed": is_hidden}
            if not is_hidden:
                line["patients"] = _patients(units[mine])
                line["rates_suppressed"] = has_few
                line |= _scores(
                    probabilities[mine], decisions[mine], targets[mine], units[mine], has_few, seed
                )
            lines.append(line)
    return lines


def _scores(
    probabilities: NDArray[np.float64],
    decisions: NDArray[np.float64],
    targets: NDArray[np.int64],
    units: NDArray[np.int64],
    only_accuracy: bool,
    seed: int,
) -> dict[str, Any]:
    rates = ("accuracy",) if only_accuracy else ("accuracy", "balanced_accuracy", "recall", "specificity")
    found = metrics.classification_metrics(decisions, targets)
    bounds = metrics.bootstrap_ci(
        decisions, targets, units=units, metrics=rates, resamples=_RESAMPLES, seed=seed
    )
    values = {name: found[name] for name in rates}
    if not only_accuracy:
        values["auc"] = metrics.auc(probabilities, targets)
        bounds |= metrics.bootstrap_ci(
            probabilities, targets, units=units, metrics=("auc",), resamples=_RESAMPLES, seed=seed
        )
    return {"metrics": values, "ci95": {name: pair and list(pair) for name, pair in bounds.items()}}


def _too_few_of_a_class(
    groups: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], classes: int
) -> list[bool]:
    """Which groups have a class that must be hidden, given (units, targets) of each group."""
    of_class = [
        suppressed([_patients(units[targets == label]) for units, targets in groups])
        for label in range(classes)
    ]
    return [any(hidden) for hidden in zip(*of_class, strict=True)]


def _patients(units: NDArray[np.int64]) -> int:
    return len(np.unique(units))


def _sex_of(text: str) -> int:
    return _SEX_OF.get(text.strip().casefold(), -1)


def _band_of(text: str) -> int:
    """Band of an age such as `54`, `54.0` or DICOM's `054Y`, `006M`; -1 for anything else."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        return -1
    years = float(match[1]) * _YEARS[match[2].lower()]
    return -1 if years > _OLDEST else sum(years >= first for first in _FIRST_YEARS)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())
