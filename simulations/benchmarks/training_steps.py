"""The ways to take one step of training that are measured, all from the same weights and on the same rows.

Ours is the production path of `client.training.private.train_privately`, from its chunks to the wrapped
optimiser's step, with noise from the operating system's entropy. The twins are the same net in float32 with
plain SGD, in two memory layouts, eager or compiled. Nobody reads or standardises images inside the step; ours
copies its rows into chunks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from client.training.batches import filled, rows_per_chunk
from client.training.lanes import lanes_for
from client.training.private import private_steps
from common.config import TrainingConfig
from common.models.registry import build_model, initial_parameters, load_parameters
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import SecureRandomness
from common.series_form import TIME_FEATURES
from common.tasks import make_task
from simulations.benchmarks.cases import StepCase

SGD, SGD_CHANNELS_LAST = "sgd", "sgd-channels-last"
COMPILED, COMPILED_CHANNELS_LAST = "sgd-compiled", "sgd-compiled-channels-last"
SGD_IN_CHUNKS = "sgd-in-chunks"
DP, DP_RAGGED = "dp", "dp-ragged"
HOOKS, GHOST = "hooks", "ghost"
EAGER_TWINS = (SGD, SGD_CHANNELS_LAST)
COMPILED_TWINS = (COMPILED, COMPILED_CHANNELS_LAST)
TWINS = EAGER_TWINS + COMPILED_TWINS

CLASSES = ("negative", "positive")
CLIP, NOISE_MULTIPLIER, LEARNING_RATE = 1.0, 1.0, 0.01
MOST_ROWS_OF_A_UNIT = 5

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to take a step."""

    step: Step
    """Takes one step."""
    model: nn.Module
    """Trained by it."""
    optimizer: Any = None
    """Of ours: the PatientDPOptimizer."""
    rows_computed: int
    """Rows that go through the network in a step, those that only fill a chunk up included."""


@dataclass(frozen=True, kw_only=True)
class _Data:
    inputs: Tensor
    targets: Tensor
    segments: np.ndarray
    """(rows,) patient of each row, never decreasing."""
    num_units: int


@contextmanager
def ways_of(case: StepCase, names: Sequence[str]) -> Iterator[Mapping[str, Way]]:
    """Each named way, ready to take steps on the rows of `case`; `dp-ragged` groups them by patient."""
    even, ragged = _data(case.even), _data(case.with_ragged)
    with ExitStack() as stack:
        if set(names) & set(COMPILED_TWINS):
            stack.callback(torch.compiler.reset)  # one more case must not count as recompiling this one
        makers: dict[str, Callable[[], Way]] = {
            SGD: lambda: _plain(case, even, torch.contiguous_format),
            SGD_CHANNELS_LAST: lambda: _plain(case, even, torch.channels_last),
            COMPILED: lambda: _plain(case, even, torch.contiguous_format, compiled=True),
            COMPILED_CHANNELS_LAST: lambda: _plain(case, even, torch.channels_last, compiled=True),
            SGD_IN_CHUNKS: lambda: _plain(case, even, torch.channels_last, rows_at_a_time=_chunk_rows(case)),
            DP: lambda: _ours(case, even, stack),
            DP_RAGGED: lambda: _ours(case, ragged, stack),
            HOOKS: lambda: _opacus_hooks(case, even),
            GHOST: lambda: _opacus_ghost(case, even),
        }
        yield {name: makers[name]() for name in names}


def _data(case: StepCase) -> _Data:
    """Random rows; where the case is ragged, patients with two to five rows each."""
    generator = torch.Generator().manual_seed(0)
    lengths = np.ones(case.batch_size, dtype=np.int64)
    if case.ragged:
        lengths = np.random.default_rng(0).integers(2, MOST_ROWS_OF_A_UNIT + 1, case.batch_size)
    segments = np.repeat(np.arange(case.batch_size), lengths)[: case.batch_size]
    inputs = torch.randn((case.batch_size, *case.input_shape), generator=generator)
    if case.spec.steps > 1:
        inputs[..., -TIME_FEATURES] = 1.0  # every step is a real one
    return _Data(
        inputs=inputs,
        targets=torch.randint(0, len(CLASSES), (case.batch_size,), generator=generator),
        segments=segments,
        num_units=int(segments[-1]) + 1,
    )


def _model(case: StepCase) -> nn.Module:
    model = build_model(case.spec)
    load_parameters(model, initial_parameters(case.spec, seed=0))
    return model.train()


def _plain(
    case: StepCase,
    data: _Data,
    memory_format: torch.memory_format,
    *,
    compiled: bool = False,
    rows_at_a_time: int = 0,
) -> Way:
    model = _model(case).to(memory_format=memory_format)
    # Series are unfolded into images within the network.
    inputs = data.inputs.to(memory_format=memory_format) if data.inputs.dim() == 4 else data.inputs
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    rows_at_a_time = min(rows_at_a_time or case.batch_size, case.batch_size)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(inputs), targets, reduction="sum") / case.batch_size

    # With fullgraph a graph that cannot be compiled raises instead of running eagerly under a wrong name.
    loss = torch.compile(loss_of, fullgraph=True, dynamic=False) if compiled else loss_of
    starts = range(0, case.batch_size, rows_at_a_time)
    parts = [(inputs[i : i + rows_at_a_time], data.targets[i : i + rows_at_a_time]) for i in starts]

    def step() -> None:
        optimizer.zero_grad()
        for part in parts:
            loss(*part).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return Way(step=step, model=model, rows_computed=case.batch_size)


def _plan(data: _Data) -> PrivacyPlan:
    return PrivacyPlan(
        sampling_rate=0.5,
        l2_clip_norm=CLIP,
        noise_multiplier=NOISE_MULTIPLIER,
        steps=10**9,
        enrolled_units=2 * data.num_units,
        max_rows_per_unit=MOST_ROWS_OF_A_UNIT,
        unit="patient",
    )


def _chunk_rows(case: StepCase) -> int:
    """Rows that ours computes at a time, unless rows have to be computed alone."""
    return rows_per_chunk(
        _model(case),
        case.input_shape,
        physical_batch_size=TrainingConfig().physical_batch_size,
        max_rows_per_unit=MOST_ROWS_OF_A_UNIT,
        lanes=lanes_for(torch.device("cpu")),
    )


def _ours(case: StepCase, data: _Data, stack: ExitStack) -> Way:
    """The steps of `train_privately`, with everybody in each."""
    steps = stack.enter_context(
        private_steps(
            _model(case),
            make_task("classification", CLASSES),
            plan=_plan(data),
            training=TrainingConfig(learning_rate=LEARNING_RATE),
            round_number=1,
            num_rounds=1,
            input_shape=tuple(data.inputs.shape[1:]),
            randomness=SecureRandomness(),
        )
    )
    rows = np.arange(case.batch_size)

    def load(some: NDArray[np.int64], filled_to: int) -> tuple[Tensor, Tensor]:
        return filled(data.inputs[some], filled_to), filled(data.targets[some], filled_to)

    def step() -> None:
        steps.clip(rows, data.segments, load=load)
        steps.update()

    chunks = len(steps.chunks(rows, data.segments))
    return Way(
        step=step, model=steps.model, optimizer=steps.optimizer, rows_computed=chunks * steps.chunk_rows
    )


def _opacus_hooks(case: StepCase, data: _Data) -> Way:
    """What `make_private` sets up by default; it clips rows, whoever they belong to."""
    wrapped = GradSampleModule(_model(case))
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP,
        expected_batch_size=case.batch_size,
    )

    def step() -> None:
        nn.functional.cross_entropy(wrapped(data.inputs), data.targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()  # at the end, so that nobody has to hold their gradients meanwhile

    return Way(step=step, model=wrapped, rows_computed=case.batch_size)


def _opacus_ghost(case: StepCase, data: _Data) -> Way:
    """What `make_private(grad_sample_mode="ghost")` sets up; it clips rows."""
    wrapped = GradSampleModuleFastGradientClipping(_model(case), max_grad_norm=CLIP)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP,
        expected_batch_size=case.batch_size,
    )
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())

    def step() -> None:
        criterion(wrapped(data.inputs), data.targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Way(step=step, model=wrapped, rows_computed=case.batch_size)
