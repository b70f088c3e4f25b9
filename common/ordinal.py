"""Ordered levels, such as severities: a cumulative link, K - 1 questions "beyond level k?" (torch on use).

The network puts out o (rows, K - 1). The logit of lying beyond level 0 is c_0 = o_0, beyond level k it is
c_k = c_(k-1) - softplus(o_k). These fall from level to level whatever the network says, so the probabilities
sigmoid(c_k) never contradict each other and their differences are those of the levels: at least 0, sum 1.

Sources: McCullagh, Regression Models for Ordinal Data, J. R. Stat. Soc. B 42 (1980), for the link; Cao,
Mirjalili and Raschka, Rank Consistent Ordinal Regression, arXiv 1901.07884, for training it as K - 1 binary
questions. There a shared weight vector with ordered biases makes them consistent, here the falling sum does,
with any network that ends in a plain linear layer.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.ordinal_metrics import levels_of, ordinal_metrics
from common.tasks import LOSS_CAP, BoundedSum, bounded, check_classes, log_sigmoid, logits_of, sum_over_units

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ordinal:
    """One of K ordered levels per record, the mildest first."""

    classes: tuple[str, ...]
    """Levels from the lowest to the highest."""
    class_weights: tuple[float, ...] | None = None
    """Public constants, one per level; each multiplies the loss of its own records and divides nothing."""
    name: str = "ordinal"
    """Name in the configuration."""
    loss: str = "bce"
    """One of `common.losses` over columns; `mse` is the ranked probability score over K - 1."""
    focal_gamma: float = 2.0
    """Exponent of the focal loss, at least 0."""

    def __post_init__(self) -> None:
        check_classes(self)

    @property
    def num_outputs(self) -> int:
        """One number per step between two levels."""
        return len(self.classes) - 1

    @property
    def target_shape(self) -> tuple[int, ...]:
        """One number, the level."""
        return ()

    @property
    def target_values(self) -> int:
        """As many as there are levels."""
        return len(self.classes)

    def losses(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Mean over the K - 1 questions of a record, times the weight of its level, (rows,)."""
        import torch

        from common.losses import column_losses

        steps = torch.nn.functional.softplus(outputs[:, 1:])
        beyond = torch.cat([outputs[:, :1], -steps], dim=1).cumsum(dim=1)
        questions = torch.arange(self.num_outputs, device=targets.device)
        there = (targets[:, None] > questions).to(outputs.dtype)
        losses = column_losses(self.loss, beyond, there, focal_gamma=self.focal_gamma).mean(dim=1)
        if self.class_weights is None:
            return losses
        return outputs.new_tensor(self.class_weights)[targets] * losses

    def probabilities(self, outputs: "Tensor | npt.NDArray[Any]") -> npt.NDArray[np.float64]:
        """Probability of each level in float64, (rows, K), sum 1; NaN where an output is not finite."""
        logits = logits_of(outputs)
        steps = -log_sigmoid(-logits[:, 1:])
        beyond = np.exp(log_sigmoid(np.hstack([logits[:, :1], -steps]).cumsum(axis=1)))
        edges = np.hstack([np.ones((len(beyond), 1)), beyond, np.zeros((len(beyond), 1))])
        return np.asarray(edges[:, :-1] - edges[:, 1:])

    def metrics(self, probabilities: npt.NDArray[Any], targets: npt.NDArray[Any]) -> dict[str, float | None]:
        """`common.ordinal_metrics.METRICS`; None where undefined."""
        return ordinal_metrics(probabilities, targets)

    def bounded_sums(
        self,
        probabilities: npt.NDArray[Any],
        targets: npt.NDArray[Any],
        *,
        units: npt.NDArray[np.integer[Any]] | None = None,
    ) -> dict[str, BoundedSum]:
        """Counts, distances and capped loss in which a unit has one vote: the mean over its rows.

        Guarantee of each entry alone, as `common.tasks.Classification.bounded_sums`. Proof: a row's vote is
        one number in [0, 1] (`count`, `correct`), in [0, K - 1] (`distance`: levels between the one said and
        the true one) or [0, LOSS_CAP] (`loss`), or has a single 1 (`targets`, `predictions`); the mean of
        rows has no larger L1 norm, and a unit adds its mean and nothing else.
        """
        levels, rows = len(self.classes), np.arange(len(targets))
        said = np.nan_to_num(probabilities.astype(np.float64), nan=0.0)
        decided = levels_of(said)
        right = (decided == targets).astype(np.float64)[:, None]
        of_target = np.clip(said[rows, targets], np.exp(-LOSS_CAP), 1.0)
        one_hot = np.eye(levels)
        votes = {
            "count": np.ones((len(rows), 1)),
            "correct": right,
            "distance": np.abs(decided - targets).astype(np.float64)[:, None],
            "loss": -np.log(of_target)[:, None],
            "targets": one_hot[targets],
            "predictions": np.hstack([one_hot[decided] * right, one_hot[decided] * (1 - right)]),
        }
        totals = {name: sum_over_units(vote, units) for name, vote in votes.items()}
        rightly = tuple(f"true {name}" for name in self.classes)
        wrongly = tuple(f"false {name}" for name in self.classes)
        return {
            "count": bounded(totals["count"], ("units",), 1.0, "units"),
            "correct": bounded(totals["correct"], ("correct",), 1.0, "units with the right level"),
            "distance": bounded(
                totals["distance"], ("levels",), float(levels - 1), "levels off the true one"
            ),
            "loss": bounded(totals["loss"], ("loss",), LOSS_CAP, "cross-entropy in nats, capped per row"),
            "targets": bounded(totals["targets"], self.classes, 1.0, "units of each level"),
            "predictions": bounded(
                totals["predictions"], rightly + wrongly, 1.0, "units said to be of each level"
            ),
        }
