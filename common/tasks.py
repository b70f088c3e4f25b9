"""What a model is trained to do: head, loss per record, probabilities and metrics (loads torch on use)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from common.metrics import classification_metrics
from common.task_kinds import CLASSIFICATION, LOSSES, MULTI_LABEL, ORDINAL, loss_problem

if TYPE_CHECKING:
    from torch import Tensor

    from common.config import PublicPlan

LOSS_CAP = 4.0
"""Nats above which a record's loss does not count further in a bounded sum (guessing among 2 costs 0.69)."""


@dataclass(frozen=True, kw_only=True)
class BoundedSum:
    """A sum that one unit can move only so far. Exact, hence private: it must not leave as it is."""

    value: tuple[float, ...]
    """The sum, one entry per label."""
    labels: tuple[str, ...]
    """What each entry counts."""
    sensitivity: float
    """Bound in L1 norm, and so in L2, on the change of `value` when one unit comes or goes."""
    meaning: str
    """One line for a person."""


class Task(Protocol):
    """A kind of target: everything that training and evaluation need to know about it."""

    @property
    def name(self) -> str:
        """Name in the configuration."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""

    @property
    def num_outputs(self) -> int:
        """Width of the model's last layer."""

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of one record's target: () for one number, (classes,) for a 0 or 1 per class."""

    @property
    def target_values(self) -> int:
        """Each number of a target is 0 to this less one."""

    def losses(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Loss (rows,) from (rows, num_outputs) and int64 (rows, *target_shape); couples no two records."""

    def probabilities(self, outputs: "Tensor | npt.NDArray[Any]") -> npt.NDArray[np.float64]:
        """Probability of each class, shape (rows, classes), from the model's outputs."""

    def metrics(self, probabilities: npt.NDArray[Any], targets: npt.NDArray[Any]) -> dict[str, float | None]:
        """Scores over rows, None where undefined. Computed on patients: private."""

    def bounded_sums(
        self,
        probabilities: npt.NDArray[Any],
        targets: npt.NDArray[Any],
        *,
        units: npt.NDArray[np.integer[Any]] | None = None,
    ) -> dict[str, BoundedSum]:
        """Sums over units that noise could make releasable; without `units` every row is its own unit."""


@dataclass(frozen=True, kw_only=True)
class Classification:
    """One class per record. With two classes the last one is the finding, the positive class."""

    classes: tuple[str, ...]
    """Class names in label order."""
    class_weights: tuple[float, ...] | None = None
    """Public constants, one per class; each multiplies the loss of its own records and divides nothing."""
    name: str = "classification"
    """Name in the configuration."""
    loss: str = "cross-entropy"
    """One of `common.losses`."""
    focal_gamma: float = 2.0
    """Exponent of the focal loss, at least 0."""

    def __post_init__(self) -> None:
        check_classes(self)

    @property
    def num_outputs(self) -> int:
        """One logit per class."""
        return len(self.classes)

    @property
    def target_shape(self) -> tuple[int, ...]:
        """One number, the class."""
        return ()

    @property
    def target_values(self) -> int:
        """As many as there are classes."""
        return len(self.classes)

    def losses(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Loss of each record (cross-entropy in nats if nothing else was asked), times its class's weight.

        No mean here: a weighted mean would divide by the batch's sum of weights, and one record of a rare
        class would rescale everybody's gradient.
        """
        from torch.nn.functional import cross_entropy

        weight = None if self.class_weights is None else outputs.new_tensor(self.class_weights)
        if self.loss == "cross-entropy":
            return cross_entropy(outputs, targets, weight=weight, reduction="none")
        from common.losses import class_losses

        losses = class_losses(self.loss, outputs, targets, focal_gamma=self.focal_gamma)
        return losses if weight is None else weight[targets] * losses

    def probabilities(self, outputs: "Tensor | npt.NDArray[Any]") -> npt.NDArray[np.float64]:
        """Softmax in float64; a row with a non-finite logit becomes NaN.

        After `bce` each class has a sigmoid of its own, and these are divided by their sum.
        """
        logits = logits_of(outputs)
        if self.loss == "bce":
            logits = log_sigmoid(logits)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))

    def metrics(self, probabilities: npt.NDArray[Any], targets: npt.NDArray[Any]) -> dict[str, float | None]:
        """AUC, accuracy, balanced accuracy, precision, recall, specificity, f1; None where undefined."""
        return classification_metrics(probabilities, targets)

    def bounded_sums(
        self,
        probabilities: npt.NDArray[Any],
        targets: npt.NDArray[Any],
        *,
        units: npt.NDArray[np.integer[Any]] | None = None,
    ) -> dict[str, BoundedSum]:
        """Counts and capped loss in which a unit has one vote: the mean over its rows, however many they are.

        Guarantee of each entry alone: adding or removing one unit with all its rows changes `value` by at
        most `sensitivity` in L1 norm. Released together, the sensitivities add up in L1 and their squares
        add up in L2. Rows with NaN probabilities vote like any other, at the full capped loss.
        """
        rows = _votes(probabilities, targets, num_classes=len(self.classes))
        totals = {name: sum_over_units(votes, units) for name, votes in rows.items()}
        every = tuple(self.classes)
        return {
            "count": bounded(totals["count"], ("units",), 1.0, "units"),
            "correct": bounded(totals["correct"], ("correct",), 1.0, "units classified correctly"),
            "loss": bounded(totals["loss"], ("loss",), LOSS_CAP, "cross-entropy in nats, capped per row"),
            "targets": bounded(totals["targets"], every, 1.0, "units of each class"),
            "predictions": bounded(
                totals["predictions"],
                tuple(f"true {name}" for name in every) + tuple(f"false {name}" for name in every),
                1.0,
                "units predicted as each class, rightly and wrongly",
            ),
        }


def make_task(
    name: str,
    classes: Sequence[str],
    *,
    class_weights: Sequence[float] | None = None,
    loss: str = "",
    focal_gamma: float = 2.0,
) -> Task:
    """Build the task of that name, with its own loss where none is named.

    Raises ConfigError for a name, classes, weights or a loss that no task has.
    """
    if name not in LOSSES:
        raise ConfigError(f"there is no task {name!r}", fix=f"choose {', '.join(LOSSES)}")
    loss = loss or LOSSES[name][0]
    if problem := loss_problem(name, loss):
        raise ConfigError("the loss does not fit the task", why=problem)
    weights = None if class_weights is None else tuple(class_weights)
    try:
        return _kind(name)(classes=tuple(classes), class_weights=weights, loss=loss, focal_gamma=focal_gamma)
    except ValueError as error:
        raise ConfigError("the classes cannot be used", why=str(error), fix="correct data.classes") from None


def task_of(plan: "PublicPlan") -> Task:
    """The task of a run, with its loss and its class weights. Raises ConfigError."""
    return make_task(
        plan.data.task,
        plan.data.classes,
        class_weights=plan.training.class_weights or None,
        loss=plan.training.loss,
        focal_gamma=plan.training.focal_gamma,
    )


def _kind(name: str) -> Any:
    if name == MULTI_LABEL:
        from common.multi_label import MultiLabel

        return MultiLabel
    if name == ORDINAL:
        from common.ordinal import Ordinal

        return Ordinal
    return Classification


def check_classes(task: Any) -> None:
    """Raise ValueError for classes, class weights, a loss or a gamma that a task of this name cannot have."""
    classes, weights = task.classes, task.class_weights
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise ValueError(f"{task.name} needs at least two distinct classes, got {list(classes)}")
    if weights is not None:
        if len(weights) != len(classes):
            raise ValueError(f"expected {len(classes)} class weights, got {len(weights)}")
        if not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"class weights must be finite and above 0, got {list(weights)}")
    if problem := loss_problem(task.name if task.name in LOSSES else CLASSIFICATION, task.loss):
        raise ValueError(problem)
    if not (np.isfinite(task.focal_gamma) and task.focal_gamma >= 0):
        raise ValueError(f"training.focal-gamma must be finite and at least 0, got {task.focal_gamma}")


def logits_of(outputs: "Tensor | npt.NDArray[Any]") -> npt.NDArray[np.float64]:
    """Outputs (rows, columns) as float64; a row with a number that is not finite is NaN throughout."""
    array = outputs if isinstance(outputs, np.ndarray) else outputs.detach().cpu().numpy()
    logits = array.astype(np.float64)
    logits[~np.isfinite(logits).all(axis=1)] = np.nan
    return logits


def log_sigmoid(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Logarithm of the sigmoid of each number, never overflowing; NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        return np.asarray(-np.logaddexp(0.0, -logits))


def _votes(
    probabilities: npt.NDArray[Any], targets: npt.NDArray[Any], *, num_classes: int
) -> Mapping[str, npt.NDArray[np.float64]]:
    """What each row contributes, shapes (rows, entries), every row within its bound."""
    rows = np.arange(len(targets))
    predicted = np.nan_to_num(probabilities, nan=0.0).argmax(axis=1)
    right = (predicted == targets).astype(np.float64)
    of_target = np.clip(np.nan_to_num(probabilities[rows, targets], nan=0.0), np.exp(-LOSS_CAP), 1.0)
    one_hot = np.eye(num_classes)
    voted = one_hot[predicted]
    return {
        "count": np.ones((len(rows), 1)),
        "correct": right[:, None],
        "loss": -np.log(of_target)[:, None],
        "targets": one_hot[targets],
        "predictions": np.hstack([voted * right[:, None], voted * (1 - right[:, None])]),
    }


def sum_over_units(
    votes: npt.NDArray[np.float64], units: npt.NDArray[np.integer[Any]] | None
) -> npt.NDArray[np.float64]:
    """Sum over units of the mean vote of their rows; without `units` every row is its own unit."""
    if units is None:
        return np.asarray(votes.sum(axis=0))
    rows_of_unit = np.bincount(units)
    return np.asarray((votes / rows_of_unit[units][:, None]).sum(axis=0))


def bounded(
    total: npt.NDArray[np.float64], labels: tuple[str, ...], sensitivity: float, meaning: str
) -> BoundedSum:
    """Name the entries of a sum (entries,)."""
    value = tuple(float(entry) for entry in total)
    return BoundedSum(value=value, labels=labels, sensitivity=sensitivity, meaning=meaning)
