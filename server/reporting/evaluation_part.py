"""Scores at one half beside those at the operating point, by hospital and by group, for page and card.

Everything here is about the held-back test split of a simulation. What the hospitals' own noised counts say
stands in `server.reporting.validation_part`.
"""

from collections.abc import Mapping
from typing import Any

from common.pages.html import Html, figure, interval, quantity, section, table, tag
from server.reporting.run_record import RunRecord
from server.reporting.task_part import OWN_SCORES

SCORES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "recall": "recall (sensitivity)",
    "specificity": "specificity",
    "precision": "precision",
    "f1": "F1",
    "ece": "expected calibration error",
    "brier": "Brier score",
    **OWN_SCORES,
}
"""Scores in the order in which they are shown, and what a person calls them."""
SUPPRESSED = "suppressed"
_OF_GROUPS = ("auc", "accuracy", "balanced_accuracy", "recall", "specificity")
Row = tuple[str, ...]


def score_rows(run: RunRecord) -> tuple[Row, list[Row]]:
    """Header and rows: each score with its interval, and where there is an operating point, also there."""
    point = _mapping(run.test.get("at_operating_point"))
    found = [name for name in SCORES if name in run.test_metrics]
    rows: list[Row] = [
        (SCORES[name], figure(run.test_metrics[name]), interval(run.test_intervals.get(name)) or "–")
        for name in found
    ]
    if not point:
        return ("score", "value", "95 % interval"), rows
    there, bounds = _mapping(point.get("metrics")), _mapping(point.get("ci95"))
    beside = [
        (figure(there.get(name)), interval(bounds.get(name)) or "–") if name in there else ("same", "same")
        for name in found
    ]
    header = ("score", "at 0.5", "95 % interval", f"at {figure(point['threshold'])}", "95 % interval")
    return header, [row + more for row, more in zip(rows, beside, strict=True)]


def score_note(run: RunRecord) -> str:
    """Where the operating point comes from; empty without one."""
    point = _mapping(run.test.get("at_operating_point"))
    if not point:
        return ""
    return (
        f"The finding is called from {figure(point['threshold'])} on, the operating point that travels with "
        f"the model ({point.get('source') or 'source not stated'}). It was not chosen on these {run.unit}s."
    )


def recalibration_note(run: RunRecord) -> str:
    """Calibration error and Brier score before and after the stored correction; empty without one."""
    after = _mapping(run.test.get("recalibrated"))
    if not after:
        return ""
    error, brier = figure(run.test.get("ece")), figure(run.test_metrics.get("brier"))
    return (
        f"After the correction that travels with the model ({after.get('method')}) the expected calibration "
        f"error is {figure(after.get('ece'))} (before: {error}) and the Brier score "
        f"{figure(after.get('brier'))} (before: {brier})."
    )


def worst_note(run: RunRecord) -> str:
    """Which hospital's kind of patients the model serves worst; empty where fewer than two are known."""
    worst = _mapping(run.evaluation.get("worst_hospital"))
    words = [
        f"{SCORES[name]} {figure(entry['value'])} ({entry['hospital']})"
        for name, entry in worst.items()
        if name in SCORES
    ]
    return f"Worst hospital: {', '.join(words)}." if words else ""


def group_rows(run: RunRecord) -> tuple[Row, list[Row]]:
    """Header and rows by sex and age; no row where the data do not tell them."""
    header = ("group", f"{run.unit}s", *(SCORES[name] for name in _OF_GROUPS))
    rows = []
    for line in run.test.get("subgroups") or ():
        name = f"{line['by']}: {line['group']}"
        if line.get("suppressed", True):
            rows.append((name, *[SUPPRESSED] * (1 + len(_OF_GROUPS))))
            continue
        found = _mapping(line.get("metrics"))
        cells = (figure(found.get(score)) if score in found else SUPPRESSED for score in _OF_GROUPS)
        rows.append((name, quantity(line.get("patients")), *cells))
    return header, rows


def group_note(run: RunRecord) -> str:
    """What is suppressed, and why."""
    return (
        f"Test {run.unit}s by group; rates at the operating point where there is one. Groups of fewer than "
        "ten are suppressed, and so is what would tell them from a total."
    )


def groups_section(run: RunRecord) -> Html:
    """The part of the page; empty where the data do not tell sex or age."""
    header, rows = group_rows(run)
    return section("By sex and age", "groups", table(group_note(run), header, rows)) if rows else Html("")


def notes(*texts: str) -> list[Html]:
    """Paragraphs of those texts that say something."""
    return [tag("p", text) for text in texts if text]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
