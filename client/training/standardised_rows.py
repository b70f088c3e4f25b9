"""Row gradients of a convolution with standardised kernels: from the kernels' to those of the weights."""

from torch import Tensor, nn

from client.training.row_gradients import DenseRows, RowGradients
from common.models.private_layers import StandardisedConv2d, standardised, standardised_kernels


def kernels_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """What the layer convolves with, given its weights."""
    return standardised(weight) if isinstance(layer, StandardisedConv2d) else weight


def of_weights(layer: nn.Module, rows: RowGradients) -> RowGradients:
    """Gradients of the weights, which are clipped, from those of the kernels.

    With k a kernel of n numbers as standardised and s one over its standard deviation, a kernel's gradient g
    becomes s (g - mean(g) - k mean(g k)): linear in g, and the same for all rows.
    """
    if not isinstance(layer, StandardisedConv2d):
        return rows
    if not isinstance(rows, DenseRows):
        raise TypeError("gradients of standardised kernels must be formed")
    centred, scales = standardised_kernels(layer.weight.detach())
    kernels = centred * scales
    gradients = rows.ordered().view(rows.rows, *kernels.shape)
    along = (gradients * kernels).mean(2, keepdim=True)
    found = gradients - gradients.mean(2, keepdim=True)
    return DenseRows(found.addcmul_(kernels, along, value=-1).mul_(scales).flatten(1))
