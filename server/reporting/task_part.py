"""What the page and the card say of tasks other than classification: words, and scores of each finding."""

from collections.abc import Iterator

from common.pages.html import Html, figure, quantity, table
from common.task_kinds import CLASSIFICATION, MULTI_LABEL, ORDINAL
from server.reporting.run_record import RunRecord

SCORES = {
    "average_precision": "average precision",
    "exact_match": "exact match (every finding right)",
    "hamming_loss": "Hamming loss (share of wrong judgements)",
    "quadratic_kappa": "quadratic weighted kappa",
    "mae": "mean distance in levels",
}
"""Scores of these tasks alone, and what a person calls them."""
_OF_ONE = ("auc", "average_precision", "precision", "recall", "specificity", "f1")
HEADER = ("", "test images with it", "AUC", "average precision", "precision", "recall", "specificity", "F1")


def task_name(run: RunRecord) -> str:
    """The run's task."""
    return str(run.data.get("task") or (run.config.data.task if run.config else CLASSIFICATION))


def output_words(run: RunRecord) -> str:
    """What the model says of an image, in one line."""
    if task_name(run) == MULTI_LABEL:
        return f"one probability for each of {len(run.classes)} findings, which do not add up to 1"
    if task_name(run) == ORDINAL:
        return f"one probability for each of {len(run.classes)} levels, from {run.classes[0]} up"
    return f"one probability for each of {len(run.classes)} classes"


def score_note(run: RunRecord) -> str:
    """How the scores of the task are meant; empty for a classification."""
    notes = {
        MULTI_LABEL: " AUC, average precision and F1 are plain means over the findings.",
        ORDINAL: " AUC is the mean over the steps between levels.",
    }
    return notes.get(task_name(run), "")


def rows_per_class(run: RunRecord) -> Iterator[tuple[str, ...]]:
    """One row per finding or step between levels; none for a classification."""
    each = run.test.get("per_class")
    for name, scores in (each if isinstance(each, dict) else {}).items():
        yield (
            str(name),
            quantity(scores.get("images_with")),
            *(figure(scores.get(score)) for score in _OF_ONE),
        )


def table_per_class(run: RunRecord) -> Html:
    """The scores of each finding by itself; empty where the task has none."""
    rows = list(rows_per_class(run))
    if not rows:
        return Html("")
    what = "finding" if task_name(run) == MULTI_LABEL else "step between levels"
    return table(f"Each {what} by itself, at one half.", HEADER, rows)
