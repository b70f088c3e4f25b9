"""Several findings at once: each is there or not, whatever the others (loads torch on use)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.multi_label_metrics import called, multi_label_metrics
from common.tasks import LOSS_CAP, BoundedSum, bounded, check_classes, log_sigmoid, logits_of, sum_over_units

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MultiLabel:
    """Any number of findings per record, none too; one sigmoid for each, so probabilities do not sum to 1."""

    classes: tuple[str, ...]
    """Findings in label order."""
    class_weights: tuple[float, ...] | None = None
    """Public constants, one per finding; each multiplies the loss of its own finding and divides nothing."""
    name: str = "multi-label"
    """Name in the configuration."""
    loss: str = "bce"
    """One of `common.losses` over columns."""
    focal_gamma: float = 2.0
    """Exponent of the focal loss, at least 0."""

    def __post_init__(self) -> None:
        check_classes(self)

    @property
    def num_outputs(self) -> int:
        """One logit per finding."""
        return len(self.classes)

    @property
    def target_shape(self) -> tuple[int, ...]:
        """A 0 or 1 for each finding."""
        return (len(self.classes),)

    @property
    def target_values(self) -> int:
        """There or not."""
        return 2

    def losses(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Mean over the findings of a record of each one's loss times its weight, (rows,)."""
        from common.losses import column_losses

        there = targets.to(outputs.dtype)
        losses = column_losses(self.loss, outputs, there, focal_gamma=self.focal_gamma)
        if self.class_weights is not None:
            losses = losses * outputs.new_tensor(self.class_weights)
        return losses.mean(dim=1)

    def probabilities(self, outputs: "Tensor | npt.NDArray[Any]") -> npt.NDArray[np.float64]:
        """Sigmoid of each finding in float64, (rows, findings); a row with a non-finite logit becomes NaN."""
        return np.asarray(np.exp(log_sigmoid(logits_of(outputs))))

    def metrics(self, probabilities: npt.NDArray[Any], targets: npt.NDArray[Any]) -> dict[str, float | None]:
        """`common.multi_label_metrics.METRICS`; None where undefined."""
        return multi_label_metrics(probabilities, targets)

    def bounded_sums(
        self,
        probabilities: npt.NDArray[Any],
        targets: npt.NDArray[Any],
        *,
        units: npt.NDArray[np.integer[Any]] | None = None,
    ) -> dict[str, BoundedSum]:
        """Counts and capped loss in which a unit has one vote on each finding: the mean over its rows.

        Guarantee of each entry alone, as `common.tasks.Classification.bounded_sums`; with K findings the L1
        sensitivity of `targets` and `predictions` is K, not 1. Proof: a row's vote has for each finding one
        number in [0, 1] (`targets`), or two of which at most one is 1 (`predictions`: called rightly, called
        wrongly), so its L1 norm is at most K; the mean of such rows has no larger one (convexity), and a unit
        adds its mean and nothing else. `agreeing` and `exact` are one number in [0, 1], `loss` one in
        [0, LOSS_CAP]. The sensitivity K is reached by a unit that has every finding.
        """
        findings, said = len(self.classes), np.nan_to_num(probabilities.astype(np.float64), nan=0.0)
        there = targets == 1
        named = called(said)
        right = named == there
        of_truth = np.clip(np.where(there, said, 1 - said), np.exp(-LOSS_CAP), 1.0)
        of_truth[~np.isfinite(probabilities).all(axis=1)] = np.exp(-LOSS_CAP)
        votes = {
            "count": np.ones((len(targets), 1)),
            "agreeing": right.mean(axis=1, keepdims=True),
            "exact": right.all(axis=1, keepdims=True).astype(np.float64),
            "loss": -np.log(of_truth).mean(axis=1, keepdims=True),
            "targets": there.astype(np.float64),
            "predictions": np.hstack([named & there, named & ~there]).astype(np.float64),
        }
        totals = {name: sum_over_units(rows, units) for name, rows in votes.items()}
        rightly = tuple(f"true {name}" for name in self.classes)
        wrongly = tuple(f"false {name}" for name in self.classes)
        return {
            "count": bounded(totals["count"], ("units",), 1.0, "units"),
            "agreeing": bounded(totals["agreeing"], ("agreeing",), 1.0, "share of findings judged rightly"),
            "exact": bounded(totals["exact"], ("exact",), 1.0, "units with every finding judged rightly"),
            "loss": bounded(totals["loss"], ("loss",), LOSS_CAP, "mean cross-entropy in nats, each capped"),
            "targets": bounded(totals["targets"], self.classes, float(findings), "units with each finding"),
            "predictions": bounded(
                totals["predictions"],
                rightly + wrongly,
                float(findings),
                "units of whom each finding is said, rightly and wrongly",
            ),
        }
