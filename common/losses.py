"""Losses of single records: pure functions on tensors that couple no two records (loads torch on use).

`outputs` are float (rows, columns). Nothing here averages over rows: who does that divides by a public number
(`client.training`). Means are over a record's own columns, so that the mean over rows of `bce` and `mse` is
torch's own `binary_cross_entropy_with_logits` and `mse_loss`.

cross-entropy   -log p_y, p = softmax(outputs)
bce             mean over columns of -[t log s + (1 - t) log(1 - s)], s = sigmoid(outputs)
focal           (1 - p_y)^gamma x cross-entropy; of columns (1 - s_t)^gamma x bce. Source: Lin et al., Focal
                Loss for Dense Object Detection, arXiv 1708.02002, equation 4, without its alpha
mse             mean over columns of (p - t)^2. Source: Brier, Monthly Weather Review 78 (1950)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def class_losses(loss: str, outputs: "Tensor", targets: "Tensor", *, focal_gamma: float) -> "Tensor":
    """Loss (rows,) of records that have one class each; `targets` int64 (rows,).

    `bce` takes every class against the rest. Example: two classes, outputs (0, 0): cross-entropy and bce are
    log 2, focal at gamma 2 is log 2 / 4, mse is 1/4.
    """
    from torch.nn.functional import cross_entropy, one_hot

    if loss == "cross-entropy":
        return cross_entropy(outputs, targets, reduction="none")
    if loss == "focal":
        # In logarithms: the power of an exact 0 would have an infinite gradient for gamma < 1.
        of_others = outputs.masked_fill(one_hot(targets, outputs.shape[1]).bool(), float("-inf"))
        log_rest = of_others.logsumexp(dim=1) - outputs.logsumexp(dim=1)
        entropy: Tensor = cross_entropy(outputs, targets, reduction="none")
        return (focal_gamma * log_rest).exp() * entropy
    there = one_hot(targets, outputs.shape[1]).to(outputs.dtype)
    if loss == "bce":
        return column_losses("bce", outputs, there, focal_gamma=focal_gamma).mean(dim=1)
    return (outputs.softmax(dim=1) - there).square().mean(dim=1)


def column_losses(loss: str, outputs: "Tensor", there: "Tensor", *, focal_gamma: float) -> "Tensor":
    """Loss (rows, columns) of columns that each are a yes or no; `there` holds 0 and 1, as float."""
    from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

    if loss == "mse":
        return (outputs.sigmoid() - there).square()
    entropy: Tensor = binary_cross_entropy_with_logits(outputs, there, reduction="none")
    if loss == "bce":
        return entropy
    log_wrong = logsigmoid(outputs * (1 - 2 * there))
    return (focal_gamma * log_wrong).exp() * entropy
