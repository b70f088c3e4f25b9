"""The optimiser of DP-SGD at patient level: Opacus' DPOptimizer, clipping patients instead of rows.

Guarantee of one step: let S(D) be the sum over the sampled units (patients) of their gradients, each clipped
to l2 norm C and rounded to the public grid of `common.privacy.noise`. The sum is exact, in whole numbers of
the grid and in any order, so adding or removing one unit with all its rows changes S by at most C(1 + 2e-6)
in l2 norm, whatever its images and the weights are, given that the float32 gradients of the other units keep
their bits (`client.training.private` sees to that, and what is done to them here is the same for each unit
whoever else is there); a unit whose gradient is not finite, or above 1e30, counts as zero. The
step releases (S + noise) / (q n): Gaussian noise of our own stream in whole numbers of the grid, its standard
deviation sigma C raised by what rounding may add, and one public divisor; division and rounding to float32
see only noised whole numbers. Sigma, C, q and n come from the frozen PrivacyPlan and from nowhere else.
Without any sampled unit the release is noise alone. What remains (timing, kernels): `common.privacy.noise`.

Private until noised, and never to leave the hospital: `grad_sample`, `summed_grad`.
Source: Abadi et al., Deep Learning with Differential Privacy, arXiv 1607.00133, algorithm 1.
"""

from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.optim import Optimizer

from common.errors import GuardError
from common.privacy.noise import NoiseGrid, integer_noise
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import RandomnessSource

_BLOCK_VALUES = 2**16
"""Float64 values that are worked on at once: they stay in a core's cache."""
_NORM_COLUMNS = 1024
"""Partial sums of a squared norm, at most; a power of two."""
_LARGEST_NORM = 1e30
"""Above it the clip factor would lose its precision in float32, and the gradient is of no use anyway."""


def sum_rows_of_units(gradients: Tensor, segments: Tensor, num_units: int) -> Tensor:
    """Add up the rows of each unit: (rows, ...) and int64 (rows,) to (num_units, ...).

    Never written as a product with an indicator matrix: 0 * nan would spread one row over all units.
    """
    if len(gradients) == num_units:  # as many rows as units, none empty: each unit has its one row
        return gradients
    sums = gradients.new_zeros((num_units, *gradients.shape[1:]))
    return sums.index_add_(0, segments, gradients)


def squared_norms(gradients: Tensor) -> Tensor:
    """Squared l2 norm of each row, float64 (rows,).

    In float64 because float32 is off by up to 2e-3 over millions of weights, which would loosen the clip.
    Elementwise in an order of its own: a library's reduction may choose its order by the number of rows.
    """
    gradients = gradients.flatten(1)
    width = min(_NORM_COLUMNS, 1 << max(gradients.shape[1] - 1, 0).bit_length())
    first, *others = torch.split(gradients, width, dim=1)
    total = first.new_zeros((len(first), width), dtype=torch.float64)
    total[:, : first.shape[1]] = first
    total.square_()
    for block in others:
        total[:, : block.shape[1]] += block.double().square_()
    while total.shape[1] > 1:
        total = total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2 :]
    return total[:, 0]


def sum_on_grid(gradients: Tensor, factors: Tensor, *, spacing: float) -> Tensor:
    """Scale each row, round it to multiples of `spacing` and add the rows up: (rows, n) to float64 (n,).

    The sum is exact in any order: float64 holds whole numbers up to 2**53, and `spacing` is a power of two.
    """
    in_grid_points = (factors.double() / spacing)[:, None]
    ones = torch.ones(len(gradients), dtype=torch.float64, device=gradients.device)
    sums = [
        torch.mv(block.double().mul_(in_grid_points).round_().T, ones) for block in _column_blocks(gradients)
    ]
    return torch.cat(sums).mul_(spacing)


def _column_blocks(gradients: Tensor) -> tuple[Tensor, ...]:
    return torch.split(gradients, max(1, _BLOCK_VALUES // len(gradients)), dim=1)


def clip_factors(norms: Tensor, *, l2_clip_norm: float) -> Tensor:
    """Factor min(1, C / norm) of each unit; 1 for norm 0, and 0 where the norm is nan, inf or absurd.

    >>> clip_factors(torch.tensor([0.0, 0.5, 4.0, float("nan")]), l2_clip_norm=1.0)
    tensor([1.0000, 1.0000, 0.2500, 0.0000])
    """
    factors = (l2_clip_norm / norms).clamp(max=1)
    return torch.where(norms <= _LARGEST_NORM, factors, torch.zeros_like(factors))


class PatientDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Wraps a fresh torch optimiser for the DP-SGD steps of one round; see the module for the guarantee.

    Use: for every chunk backward, then `accumulate`; once per logical batch `step`. Raises GuardError on any
    other use, so that no path of Opacus clips by row, skips noise or keeps a half-finished batch.
    """

    def __init__(
        self, optimizer: Optimizer, *, plan: PrivacyPlan, randomness: RandomnessSource, round_number: int
    ) -> None:
        self._plan = plan
        self._randomness = randomness
        self._round_number = round_number
        self._steps_taken = 0
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.l2_clip_norm,
            expected_batch_size=plan.expected_batch_size,
            loss_reduction="sum",
        )
        # Asked for often, and the same for the whole round. Any: Opacus hangs its own attributes on them.
        self._parameters: list[Any] = self.params
        self._grid = NoiseGrid.of(plan, num_parameters=sum(p.numel() for p in self._parameters))

    @property
    def grid(self) -> NoiseGrid:
        """The public grid of the sum and the noise."""
        return self._grid

    @property
    def plan(self) -> PrivacyPlan:
        """The numbers that this optimiser works with."""
        return self._plan

    @property
    def steps_taken(self) -> int:
        """Noisy steps so far; never above `plan.steps`."""
        return self._steps_taken

    @property
    def noise_multiplier(self) -> float:
        """Sigma of the plan; Opacus' noise schedulers cannot set another."""
        return self._plan.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        _refuse_other("noise_multiplier", value, self._plan.noise_multiplier)

    @property
    def max_grad_norm(self) -> float:
        """C of the plan; Opacus' clip schedulers cannot set another."""
        return self._plan.l2_clip_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        _refuse_other("max_grad_norm", value, self._plan.l2_clip_norm)

    @property
    def expected_batch_size(self) -> float:
        """Divisor q * n of the plan, however many patients a step really had."""
        return self._plan.expected_batch_size

    @expected_batch_size.setter
    def expected_batch_size(self, value: float) -> None:
        _refuse_other("expected_batch_size", value, self._plan.expected_batch_size)

    @torch.no_grad()
    def accumulate(self, segments: Tensor, num_units: int) -> None:
        """Clip each unit's gradient and add it to `summed_grad`; frees the per-row gradients.

        segments: int64 (rows,), never decreasing, the unit 0..num_units-1 of each row of the last backward;
        every unit has at least one row, and all its rows of this step are in this call.
        """
        wanted = torch.arange(num_units, device=segments.device)
        if num_units < 1 or not torch.equal(torch.unique_consecutive(segments), wanted):
            raise ValueError("segments must be 0..num_units-1, never decreasing, each at least once")
        gradients = [self._take(p, rows=len(segments)) for p in self._parameters]
        gradients = [sum_rows_of_units(g, segments, num_units).flatten(1) for g in gradients]
        norms = torch.zeros(num_units, dtype=torch.float64, device=segments.device)
        for gradient in gradients:
            norms += squared_norms(gradient)
        norms.sqrt_()
        factors = clip_factors(norms, l2_clip_norm=self._plan.l2_clip_norm)
        broken = factors == 0
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            gradient[broken] = 0  # their factor is 0, but 0 * nan is nan
            clipped = sum_on_grid(gradient, factors, spacing=self._grid.spacing).view_as(parameter)
            if parameter.summed_grad is not None:
                clipped += parameter.summed_grad
            parameter.summed_grad = clipped

    def add_noise(self) -> None:
        """Set `grad` to the sum of clipped gradients plus noise over the expected batch size.

        Added in whole numbers of the grid; divided in float64 and rounded to float32 once, at the end.
        """
        stream = self._randomness.stream(
            purpose="noise", round_number=self._round_number, step=self._steps_taken
        )
        spacing = self._grid.spacing
        for parameter in self._parameters:
            noise = torch.from_numpy(integer_noise(parameter.numel(), grid=self._grid, stream=stream))
            release = noise.to(parameter.device).view_as(parameter)
            if parameter.summed_grad is not None:
                release += (parameter.summed_grad / spacing).round_().long()
            gradient = release.double().mul_(spacing / self._plan.expected_batch_size)
            parameter.grad = gradient.to(parameter.dtype)
            parameter.summed_grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Add the noise and take one step of the wrapped optimiser; forgets everything else."""
        if closure is not None:
            raise GuardError("a closure would compute gradients that are not clipped", fix="call accumulate")
        if any(getattr(p, "grad_sample", None) is not None for p in self._parameters):
            raise GuardError("gradients of a chunk were not accumulated", fix="call accumulate before step")
        if self._steps_taken >= self._plan.steps:
            raise GuardError(
                f"the plan has {self._plan.steps} steps and all of them ran",
                why="a further step would not be in the ledger",
            )
        self.add_noise()
        self._steps_taken += 1
        self.original_optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient, also those of an unfinished logical batch."""
        for parameter in self._parameters:
            parameter.grad = parameter.grad_sample = parameter.summed_grad = None

    def clip_and_accumulate(self) -> None:
        """Refuse: Opacus would clip rows here, not patients."""
        raise GuardError("Opacus clips rows, not patients", fix="call accumulate")

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Refuse: BatchMemoryManager can leave half a logical batch behind (trap T7)."""
        raise GuardError(
            "BatchMemoryManager is not used here",
            why="left early, it carries patients over into the next release",
            fix="call accumulate for each chunk",
        )

    def attach_step_hook(self, fn: Any) -> None:
        """Refuse: steps are charged to the ledger before they run."""
        raise GuardError("steps are charged before they run, not by a hook", fix="charge the ledger")

    def _take(self, parameter: Any, *, rows: int) -> Tensor:
        gradient = getattr(parameter, "grad_sample", None)
        parameter.grad_sample = parameter.grad = None
        if not isinstance(gradient, Tensor) or len(gradient) != rows:
            raise GuardError(
                "a layer has no gradient for each row",
                why="it was not reached by the last backward, or its inputs do not have one entry per row",
                fix="use every layer once per forward, in training mode, with rows first",
            )
        return gradient


def _refuse_other(name: str, value: float, planned: float) -> None:
    if value != planned:
        raise GuardError(
            f"{name} cannot be changed from {planned} to {value}",
            why="the accounting rests on the plan's number (trap T2)",
            fix="make another plan",
        )
