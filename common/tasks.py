"""What a model is trained to do: head, loss per record, probabilities and metrics (loads torch on use)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from common.metrics import classification_metrics

if TYPE_CHECKING:
    from torch import Tensor

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

    def losses(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Loss of each record, (rows,), from (rows, num_outputs) and (rows,); couples no two records."""

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

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classification needs at least two distinct classes, got {list(self.classes)}")
        weights = self.class_weights
        if weights is not None:
            if len(weights) != len(self.classes):
                raise ValueError(f"expected {len(self.classes)} class weights, got {len(weights)}")
            if not all(np.isfinite(weight) and weight > 0 for weight in weights):
                raise ValueError(f"class weights must be finite and above 0, got {list(weights)}")

    @property
    def num_outputs(self) -> int:
        """One logit per class."""
        return len(self.classes)

    def losses(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Cross-entropy of each record in nats, times the weight of its class.

        No mean here: a weighted mean would divide by the batch's sum of weights, and one record of a rare
        class would rescale everybody's gradient.
        """
        from torch.nn.functional import cross_entropy

        weight = None if self.class_weights is None else outputs.new_tensor(self.class_weights)
        return cross_entropy(outputs, targets, weight=weight, reduction="none")

    def probabilities(self, outputs: "Tensor | npt.NDArray[Any]") -> npt.NDArray[np.float64]:
        """Softmax in float64; a row with a non-finite logit becomes NaN."""
        array = outputs if isinstance(outputs, np.ndarray) else outputs.detach().cpu().numpy()
        logits = array.astype(np.float64)
        logits[~np.isfinite(logits).all(axis=1)] = np.nan
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
        totals = {name: _sum_over_units(votes, units) for name, votes in rows.items()}
        every = tuple(self.classes)
        return {
            "count": _bounded(totals["count"], ("units",), 1.0, "units"),
            "correct": _bounded(totals["correct"], ("correct",), 1.0, "units classified correctly"),
            "loss": _bounded(totals["loss"], ("loss",), LOSS_CAP, "cross-entropy in nats, capped per row"),
            "targets": _bounded(totals["targets"], every, 1.0, "units of each class"),
            "predictions": _bounded(
                totals["predictions"],
                tuple(f"true {name}" for name in every) + tuple(f"false {name}" for name in every),
                1.0,
                "units predicted as each class, rightly and wrongly",
            ),
        }


def make_task(name: str, classes: Sequence[str], *, class_weights: Sequence[float] | None = None) -> Task:
    """Build the task of that name; raises ConfigError for a name or classes that no task has."""
    if name not in ("classification", "progression"):
        raise ConfigError(f"there is no task {name!r}", fix="choose classification or progression")
    weights = None if class_weights is None else tuple(class_weights)
    try:
        return Classification(classes=tuple(classes), class_weights=weights, name=name)
    except ValueError as error:
        raise ConfigError("the classes cannot be used", why=str(error), fix="correct data.classes") from None


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


def _sum_over_units(
    votes: npt.NDArray[np.float64], units: npt.NDArray[np.integer[Any]] | None
) -> npt.NDArray[np.float64]:
    """Sum over units of the mean vote of their rows."""
    if units is None:
        return np.asarray(votes.sum(axis=0))
    rows_of_unit = np.bincount(units)
    return np.asarray((votes / rows_of_unit[units][:, None]).sum(axis=0))


def _bounded(
    total: npt.NDArray[np.float64], labels: tuple[str, ...], sensitivity: float, meaning: str
) -> BoundedSum:
    value = tuple(float(entry) for entry in total)
    return BoundedSum(value=value, labels=labels, sensitivity=sensitivity, meaning=meaning)
