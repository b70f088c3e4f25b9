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

from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeGuard

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.optim import Optimizer

from client.training.row_gradients import DenseRows, ProductRows, RowGradients, Units, add_product, together
from common.errors import GuardError
from common.privacy.noise import NoiseGrid, integer_noise, most_sampled
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import RandomnessSource

_LARGEST_NORM = 1e18
"""Squares of larger numbers are infinite in float32, and the gradient is of no use anyway."""
_SMALLEST_CLIP = 1e-12
_SMALL = 4096
"""Parameters of at most so many numbers are worked on together."""
_LARGE = 2**20
"""Parameters of so many numbers: their sum is gone through once for several chunks."""
_MOST_PENDING = 2**11
"""Rows times positions that wait for it."""
_PIECE = 2**18
"""Numbers that take their noise from one stream."""
_IN_CACHE = 2**15


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
        self._units_of_step = 0
        self._pending: dict[int, list[tuple[Tensor, Tensor]]] = {}
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.l2_clip_norm,
            expected_batch_size=plan.expected_batch_size,
            loss_reduction="sum",
        )
        # Asked for often, and the same for the whole round. Any: Opacus hangs its own attributes on them.
        self._parameters: list[Any] = self.params
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
    def accumulate(self, segments: Tensor, num_units: int) -> None:
        """Clip each unit's gradient and add it to `summed_grad`; frees the per-row gradients.

        segments: int64 (own rows,), never decreasing, the unit 0..num_units-1 of each row of the last
        backward but those that only fill it up, which come last; every unit has at least one row, and all its
        rows of this step are in this call.
        """
        found = {id(p): self._take(p, at_least=len(segments)) for p in self._parameters}
        numbers = {gradients.rows for gradients in found.values()}
        if len(numbers) != 1:
            raise GuardError("layers have gradients for different numbers of rows", why=_MISSED, fix=_ONCE)
        units = Units.of(segments, num_units, rows=numbers.pop())
        self._count_units(num_units)
        small = {id(p): rows for p in self._parameters if _is_small(rows := found[id(p)])}
        # Small ones as if they were one: otherwise there is more to call than to compute.
        joined = [together(list(small.values()))] if small else []
        parts = [*joined, *(found[id(p)] for p in self._parameters if id(p) not in small)]
        squared = torch.stack([part.squared_norms(units) for part in parts]).sum(0)
        factors = clip_factors(squared.sqrt_(), l2_clip_norm=self._plan.l2_clip_norm)
        factors[num_units:] = 0
        broken = (factors == 0) if bool((factors == 0).any()) else None
        for rows in joined:
            self._add_small([p for p in self._parameters if id(p) in small], rows, factors, units, broken)
        for parameter in self._parameters:
            if id(parameter) not in small:
                self._add_large(parameter, found[id(parameter)], factors, units, broken)

    def _add_small(
        self, parameters: list[Any], rows: DenseRows, factors: Tensor, units: Units, broken: Tensor | None
    ) -> None:
        total = torch.zeros(rows.width, dtype=torch.float64, device=factors.device)
        rows.add_clipped(total, factors, units, broken)
        end = 0
        for parameter in parameters:
            start, end = end, end + parameter.numel()
            _summed(parameter).add_(total[start:end].view_as(parameter))

    def _add_large(
        self, parameter: Any, rows: RowGradients, factors: Tensor, units: Units, broken: Tensor | None
    ) -> None:
        if not isinstance(rows, ProductRows) or parameter.numel() < _LARGE:
            rows.add_clipped(_summed(parameter), factors, units, broken)
            return
        pending = self._pending.setdefault(id(parameter), [])
        pending.append(rows.clipped_factors(factors, units, broken))
        if sum(len(left) for left, _ in pending) >= _MOST_PENDING:
            self._settle(parameter)

    def _settle(self, parameter: Any) -> None:
        if pending := self._pending.pop(id(parameter), None):
            left, right = (torch.cat(factors) for factors in zip(*pending, strict=True))
            add_product(_summed(parameter), left, right)

    def settle(self) -> None:
        """Add what is pending of large parameters to their `summed_grad`; `step` does so itself."""
        for parameter in self._parameters:
            self._settle(parameter)

    def add_noise(self) -> None:
        """Set `grad` to the sum of clipped gradients plus noise over the expected batch size.

        Added in whole numbers of the grid; divided in float64 and rounded to float32 once, at the end.
        """
        pieces = [
            (parameter, start)
            for parameter in self._parameters
            for start in range(0, parameter.numel(), _PIECE)
        ]
        for parameter in self._parameters:
            parameter.grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        with ThreadPoolExecutor(min(torch.get_num_threads(), len(pieces))) as pool:
            for done in [pool.submit(self._release, number, *piece) for number, piece in enumerate(pieces)]:
                done.result()
        for parameter in self._parameters:
            parameter.summed_grad = None

    @torch.no_grad()
    def _release(self, piece: int, parameter: Any, start: int) -> None:
        """Noise on _PIECE numbers of a parameter, from a stream of their own; safe to run beside others."""
        stream = self._randomness.stream(
            purpose="noise", round_number=self._round_number, step=self._steps_taken, part=piece
        )
        gradient = parameter.grad.view(-1)[start : start + _PIECE]
        summed = None if parameter.summed_grad is None else parameter.summed_grad.view(-1)
        spacing = self._grid.spacing
        for first in range(0, len(gradient), _IN_CACHE):
            into = gradient[first : first + _IN_CACHE]
            noise = torch.from_numpy(integer_noise(len(into), grid=self._grid, stream=stream))
            release = noise.to(parameter.device)
            if summed is not None:
                own = summed[start + first : start + first + len(into)]
                release += (own / spacing).round_().long()
            into.copy_(release.double().mul_(spacing / self._plan.expected_batch_size))

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
        self.settle()
        self.add_noise()
        self._steps_taken += 1
        self._units_of_step = 0
        self.original_optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient, also those of an unfinished logical batch."""
        for parameter in self._parameters:
            parameter.grad = parameter.grad_sample = parameter.summed_grad = None
        self._units_of_step = 0
        self._pending.clear()

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


def _summed(parameter: Any) -> Tensor:
    """The sum so far, float64, zeros at first."""
    if parameter.summed_grad is None:
        parameter.summed_grad = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
    return torch.as_tensor(parameter.summed_grad)


def _is_small(gradients: RowGradients) -> TypeGuard[DenseRows]:
    return isinstance(gradients, DenseRows) and gradients.in_order and gradients.width <= _SMALL


def _refuse_other(name: str, value: float, planned: float) -> None:
    if value != planned:
        raise GuardError(
            f"{name} cannot be changed from {planned} to {value}",
            why="the accounting rests on the plan's number (trap T2)",
            fix="make another plan",
        )
