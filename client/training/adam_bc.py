"""DP-AdamBC: Adam on noised gradients, with the known variance of the noise taken off the second moment.

The noise of DP-SGD has variance Phi = (sigma C / (q n))^2 in every number of the gradient, public and often
far above the gradient's own square. Plain Adam then divides by sqrt(Phi) everywhere: it is SGD with momentum.
Post-processing of the noised gradients and of public numbers, so the guarantee is that of the gradients.
Source: Tang, Shpilevskiy and Lecuyer, DP-AdamBC, arXiv 2312.14334, algorithm 1.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common.privacy.plan import PrivacyPlan

BETAS = (0.9, 0.999)
"""Decay of the two moving averages, as Adam's; the server's bound on updates rests on them."""


def noise_variance(plan: PrivacyPlan) -> float:
    """Phi: variance of the noise in one number of a step's gradient. Example: sigma 2, C 1, q n 100: 4e-4."""
    return (plan.noise_multiplier * plan.l2_clip_norm / plan.expected_batch_size) ** 2


class AdamBC(Optimizer):
    """Step of size lr m / sqrt(max(v - Phi, floor)), m and v Adam's moments without their start at zero.

    `noise_variance` is Phi, `floor` the paper's gamma', above 0. Raises ValueError for other numbers.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, noise_variance: float, floor: float
    ) -> None:
        if not (lr > 0 and noise_variance >= 0 and floor > 0):
            raise ValueError(f"lr {lr}, noise variance {noise_variance} or floor {floor} cannot be used")
        defaults = {"lr": lr, "noise_variance": noise_variance, "floor": floor, "weight_decay": 0.0}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients; raises ValueError for a closure."""
        if closure is not None:
            raise ValueError("a closure would compute gradients again")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _move(parameter, self.state[parameter], group)


def _move(parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
    gradient, (first, second) = parameter.grad, BETAS
    assert gradient is not None
    state["step"] += 1
    state["mean"].lerp_(gradient, 1 - first)
    state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    mean = state["mean"] / (1 - first ** state["step"])
    square = state["square"] / (1 - second ** state["step"])
    scale = (square - group["noise_variance"]).clamp(min=group["floor"]).sqrt_()
    parameter.addcdiv_(mean, scale, value=-group["lr"])
