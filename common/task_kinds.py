"""What each kind of task allows, known without loading numpy: losses, and how wide the last layer is."""

from collections.abc import Mapping, Sequence
from typing import Final, Literal

TaskName = Literal["classification", "multi-label", "ordinal"]
LossName = Literal["cross-entropy", "bce", "focal", "mse"]

CLASSIFICATION: Final = "classification"
MULTI_LABEL: Final = "multi-label"
ORDINAL: Final = "ordinal"

LOSSES: Final[Mapping[str, tuple[str, ...]]] = {
    CLASSIFICATION: ("cross-entropy", "bce", "focal", "mse"),
    MULTI_LABEL: ("bce", "focal", "mse"),
    ORDINAL: ("bce", "focal", "mse"),
}
"""By task, its own first: what `flower-simulate` takes where nobody names a loss."""


def outputs_of(task: str, num_classes: int) -> int:
    """Width of the last layer: one logit per class; of an ordinal task one per step between two levels."""
    return num_classes - 1 if task == ORDINAL else num_classes


def loss_problem(task: str, loss: str) -> str | None:
    """Why a task cannot be trained with a loss, in words; None where it can."""
    allowed = LOSSES.get(task, ())
    if loss in allowed:
        return None
    fitting = _listed(allowed)
    return f"training.loss = {loss!r} is no loss of data.task = {task!r}: write training.loss = {fitting}"


def weights_problem(num_classes: int, weights: Sequence[float]) -> str | None:
    """Why class weights cannot be used, in words; None where they can; none at all are fine."""
    if weights and len(weights) != num_classes:
        return f"training.class-weights has {len(weights)} numbers for {num_classes} classes"
    if not all(0 < weight < float("inf") for weight in weights):
        return f"training.class-weights must be finite and above 0, got {list(weights)}"
    return None


def _listed(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
