"""Integrated Gradients: what each pixel adds to a class's score on the way from black to the picture.

Source: Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, arXiv 1703.01365, equation 3.
The baseline is black, which is where a film shows nothing. A blurred picture as baseline was tried and is
wrong here: the way to it makes edges, not opacities.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Score = Callable[[Tensor, Tensor], Tensor]
"""What is explained: (rows,) numbers from outputs (rows, classes) and classes (rows,)."""

STEPS = 50
"""Of the path; the sum of the attributions then is the difference of the scores to about 1 %."""
QUICK_STEPS = 8
"""Enough to say where, not how much."""
SMOOTHED = 1 / 16
"""Standard deviation of the smoothing as a share of the picture's side: single pixels say nothing."""


def class_score(logits: Tensor, classes: Tensor, *, against_others: bool = True) -> Tensor:
    """(rows,) the logit of each row's class, from (rows, classes), less the mean of the others if wanted."""
    chosen = logits.gather(1, classes[:, None])[:, 0]
    others = logits.shape[1] - 1 if against_others else 0
    return chosen - (logits.sum(dim=1) - chosen) / others if others else chosen


def integrated_gradients(
    network: nn.Module,
    inputs: Tensor,
    classes: Tensor,
    *,
    baseline: Tensor,
    steps: int = STEPS,
    score: Score = class_score,
) -> Tensor:
    """Attributions of the shape of `inputs` (rows, channels, h, w), by the midpoint rule on a straight path.

    Their sum over a row is the score of the inputs less that of the baseline, as far as `steps` suffice.
    """
    total = torch.zeros_like(inputs)
    for step in range(steps):
        share = (step + 0.5) / steps
        point = (baseline + share * (inputs - baseline)).detach().requires_grad_()
        with torch.enable_grad():
            found = score(network(point), classes).sum()
            (gradient,) = torch.autograd.grad(found, point)
        total += gradient
    return total / steps * (inputs - baseline)


def smoothed(maps: Tensor) -> Tensor:
    """Maps (rows, h, w) under a Gaussian of SMOOTHED times their side; borders are continued."""
    spread = SMOOTHED * maps.shape[-1]
    reach = max(1, round(3 * spread))
    places = torch.arange(-reach, reach + 1, dtype=maps.dtype)
    kernel = torch.exp(-(places**2) / (2 * spread**2))
    kernel = kernel / kernel.sum()
    padded = nn.functional.pad(maps[:, None], [reach] * 4, mode="replicate")
    down = nn.functional.conv2d(padded, kernel[None, None, :, None])
    return nn.functional.conv2d(down, kernel[None, None, None, :])[:, 0]
