"""The optimiser of DP-SGD at patient level: Opacus' DPOptimizer, clipping patients instead of rows.

Guarantee of one step: let S(D) be the sum over the sampled units (patients) of their gradients, each clipped
to l2 norm C. Adding or removing one unit with all its rows changes S, as computed and rounded to the public
grid, by at most C and the share that `common.privacy.noise` states, whatever its images and the weights are,
given that the float32 gradients of the other units keep their bits (`client.training.private` sees to that);
a unit whose gradient is not finite, or above 1e18, counts as zero. The step releases (S + noise) / (q n):
Gaussian noise of our own streams in whole numbers of the grid, its standard deviation sigma C raised by that
share, and one public divisor; division and rounding to float32 see only noised whole numbers. Sigma, C, q
and n come from the frozen PrivacyPlan alone. Without any sampled unit the release is noise alone.

Private until noised, and never to leave the hospital: `grad_sample`, `summed_grad`, what is pending.
Source: Abadi et al., Deep Learning with Differential Privacy, arXiv 1607.00133, algorithm 1.
"""

from collections.abc import Sequence
from functools import partial
from threading import Lock
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.optim import Optimizer

from client.training.clipped_sums import LARGE, ClippedSums, is_joined, small_together
from client.training.lanes import side_by_side
from client.training.row_gradients import DenseRows, ProductRows, RowGradients, Units
from common.errors import GuardError
from common.privacy.noise import NoiseGrid, most_sampled, release
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import RandomnessSource

_LARGEST_NORM = 1e18
"""Squares of larger numbers are infinite in float32, and the gradient is of no use anyway."""
_SMALLEST_CLIP = 1e-12
AUTOMATIC_STABILITY = 0.01
"""What automatic clipping adds to a norm: much shorter gradients stay shorter than C."""
_PIECE = 2**18
"""Numbers that take their noise from one stream."""


def clip_factors(norms: Tensor, *, l2_clip_norm: float) -> Tensor:
    """Factor min(1, C / norm) of each unit; 1 for norm 0, and 0 where the norm is nan, inf or absurd.

    >>> clip_factors(torch.tensor([0.0, 0.5, 4.0, float("nan")]), l2_clip_norm=1.0)
    tensor([1.0000, 1.0000, 0.2500, 0.0000])
    """
    factors = (l2_clip_norm / norms).clamp(max=1)
    return torch.where(norms <= _LARGEST_NORM, factors, torch.zeros_like(factors))


def automatic_factors(norms: Tensor, *, l2_clip_norm: float) -> Tensor:
    """Factor C / (norm + AUTOMATIC_STABILITY) of each unit: long and short gradients all come near norm C.

    Sensitivity: norm * C / (norm + s) < C for every norm and s > 0, so a unit moves the sum by at most C as
    with `clip_factors`, whose slack for norms that came out too small covers this: C / (norm + s) is below
    C / norm, and gradients whose squares vanish in float32 are far below s. 0 as there for nan, inf, absurd.
    Source: Bu et al., Automatic Clipping, arXiv 2206.07136, equation 3.1 (AUTO-S), with s = 0.01.

    >>> automatic_factors(torch.tensor([0.0, 0.49, 3.99, float("nan")]), l2_clip_norm=1.0)
    tensor([100.0000,   2.0000,   0.2500,   0.0000])
    """
    factors = l2_clip_norm / (norms + AUTOMATIC_STABILITY)
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
        self._units_of_step = 0
        self._released: dict[int, Tensor] = {}
        self._counting = Lock()
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.l2_clip_norm,
            expected_batch_size=plan.expected_batch_size,
            loss_reduction="sum",
        )
        # Asked for often, and the same for the whole round. Any: Opacus hangs its own attributes on them.
        self._parameters: list[Any] = self.params
        self._sums = ClippedSums(self._parameters)
        if plan.l2_clip_norm < _SMALLEST_CLIP:
            raise GuardError("the clip is too small", why=_VANISH, fix=f"take at least {_SMALLEST_CLIP:g}")
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
    def accumulate(
        self, segments: Tensor, num_units: int, *, parameters: Sequence[Any] | None = None
    ) -> None:
        """Clip each unit's gradient and add it to `summed_grad`; frees the per-row gradients.

        segments: int64 (own rows,), never decreasing, the unit 0..num_units-1 of each row of the last
        backward but those that only fill it up, which come last; every unit has at least one row, and all its
        rows of this step are in this call. parameters: those of a copy of the network that shares the
        weights (`client.training.lanes`), in the same order; copies may be used at the same time.
        """
        own = self._parameters if parameters is None else parameters
        self._sums.include(own)
        found = {p: self._take(p, at_least=len(segments)) for p in own}
        numbers = {gradients.rows for gradients in found.values()}
        if len(numbers) != 1:
            raise GuardError("layers have gradients for different numbers of rows", why=_MISSED, fix=_ONCE)
        units = Units.of(segments, num_units, rows=numbers.pop())
        self._count_units(num_units)
        parts = [rows for rows in found.values() if not is_joined(rows)]
        if (joined := small_together(found)) is not None:
            parts.append(joined)
        squared = torch.stack([part.squared_norms(units) for part in parts]).sum(0)
        bounded = automatic_factors if self._plan.clipping == "automatic" else clip_factors
        factors = bounded(squared.sqrt_(), l2_clip_norm=self._plan.l2_clip_norm)
        factors[num_units:] = 0
        broken = (factors == 0) if bool((factors == 0).any()) else None
        self._sums.add(found, factors, units, broken, joined)

    def include(self, parameters: Sequence[Any]) -> None:
        """Take the sums of a copy's parameters as ours; in the order of the copies they are added up."""
        self._sums.include(parameters)

    def settle(self) -> None:
        """Bring everything that is in no `summed_grad` of ours yet into it; `step` does so itself."""
        self._sums.settle()

    def add_noise(self) -> None:
        """Set `grad` to the sum of clipped gradients plus noise over the expected batch size.

        Added in whole numbers of the grid; divided in float64 and rounded to float32 once, at the end.
        """
        for parameter in self._parameters:
            parameter.grad = self._released.pop(id(parameter), None)
            if parameter.grad is None:
                parameter.grad = torch.empty(parameter.shape, device=parameter.device)
            if parameter.numel() < LARGE:
                self._released[id(parameter)] = parameter.grad
        pieces = [
            (parameter, start)
            for parameter in self._parameters
            for start in range(0, parameter.numel(), _PIECE)
        ]
        side_by_side(
            [partial(self._release, number, *piece) for number, piece in enumerate(pieces)],
            lanes=torch.get_num_threads(),
        )
        self._sums.clear()

    @torch.no_grad()
    def _release(self, piece: int, parameter: Any, start: int) -> None:
        """Noise on _PIECE numbers of a parameter, from a stream of their own; safe to run beside others."""
        stream = self._randomness.stream(
            purpose="noise", round_number=self._round_number, step=self._steps_taken, part=piece
        )
        here = slice(start, start + _PIECE)
        summed = None if parameter.summed_grad is None else parameter.summed_grad.view(-1)[here].cpu().numpy()
        gradient = parameter.grad.view(-1)[here]
        into = gradient.cpu()
        release(
            summed, into=into.numpy(), grid=self._grid, stream=stream, divisor=self._plan.expected_batch_size
        )
        if gradient.device != into.device:
            gradient.copy_(into)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Add the noise and take one step of the wrapped optimiser; forgets everything else."""
        if closure is not None:
            raise GuardError("a closure would compute gradients that are not clipped", fix="call accumulate")
        if self._sums.are_waiting:
            raise GuardError("gradients of a chunk were not accumulated", fix="call accumulate before step")
        if self._steps_taken >= self._plan.steps:
            raise GuardError(
                f"the plan has {self._plan.steps} steps and all of them ran",
                why="a further step would not be in the ledger",
            )
        self.settle()
        self.add_noise()
        self._steps_taken += 1
        self._units_of_step = 0
        self.original_optimizer.step()

    def forget_large_release(self) -> None:
        """Give up the memory of what was released for large parameters: the next chunks need the room."""
        for parameter in self._parameters:
            if id(parameter) not in self._released:
                parameter.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient, also those of an unfinished logical batch."""
        self._sums.forget()
        self._units_of_step = 0

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

    def _take(self, parameter: Any, *, at_least: int) -> RowGradients:
        gradients = getattr(parameter, "grad_sample", None)
        parameter.grad_sample = parameter.grad = None
        if not isinstance(gradients, DenseRows | ProductRows) or gradients.rows < at_least:
            raise GuardError("a layer has no gradient for each row", why=_MISSED, fix=_ONCE)
        return gradients

    def _count_units(self, more: int) -> None:
        with self._counting:
            self._units_of_step += more
        if self._units_of_step > most_sampled(self._plan):
            raise GuardError(
                f"{self._units_of_step} units entered a step that expects {self._plan.expected_batch_size:g}",
                why="rounding of the sum is paid for up to four times the expected number",
                fix="sample units with the plan's rate from as many as are enrolled",
            )


_VANISH = "squares of such small numbers vanish in float32"
_MISSED = "it was not reached by the last backward, or its inputs do not have one entry per row"
_ONCE = "use every layer once per forward, in training mode, with rows first"


def _refuse_other(name: str, value: float, planned: float) -> None:
    if value != planned:
        raise GuardError(
            f"{name} cannot be changed from {planned} to {value}",
            why="the accounting rests on the plan's number (trap T2)",
            fix="make another plan",
        )
