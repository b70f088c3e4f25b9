"""One step of private training against the same step without privacy, and against Opacus' own modes.

Ours is the production path: `accumulate_clipped_gradients` for each chunk, then `PatientDPOptimizer.step`
with noise from the operating system's entropy. The twin without privacy is the same net in float32 on the
same rows with plain SGD, in the memory layout that is faster. All ways start from the same weights and see
the same random rows; nobody reads images inside the step.
"""

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from client.training.batches import chunks_of_units, filled, rows_per_chunk
from client.training.patient_optimizer import PatientDPOptimizer
from client.training.plain import make_optimizer
from client.training.private import accumulate_clipped_gradients, per_row_gradients
from common.config import ModelSpec, TrainingConfig
from common.models.registry import build_model, initial_parameters, load_parameters
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import SecureRandomness
from common.tasks import make_task
from simulations.benchmarks.cases import StepCase
from simulations.benchmarks.interleaving import interleave

SGD, SGD_CHANNELS_LAST, DP = "sgd", "sgd-channels-last", "dp"
HOOKS, GHOST = "hooks", "ghost"
WAYS = (SGD, SGD_CHANNELS_LAST, DP, HOOKS, GHOST)

CLASSES = ("negative", "positive")
CLIP, NOISE_MULTIPLIER, LEARNING_RATE = 1.0, 1.0, 0.01

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class _Data:
    inputs: Tensor
    targets: Tensor
    segments: np.ndarray
    """(rows,) patient of each row, never decreasing."""
    num_units: int


def measure_step(case: StepCase, *, repeats: int, budget_s: float) -> dict[str, Any]:
    """Median seconds of a step by every way and their ratios; `raw` has the seconds of every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Opacus about its own hooks
        with steps_of(case) as steps:
            seconds = interleave(steps, repeats=repeats, budget_s=budget_s)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    twin = min((SGD, SGD_CHANNELS_LAST), key=lambda way: medians[way])
    return {
        "case": case.name,
        "seconds_sgd": medians[twin],
        "seconds_dp": medians[DP],
        "ratio_to_sgd": medians[DP] / medians[twin],
        "speedup_over_hooks": medians[HOOKS] / medians[DP],
        "speedup_over_ghost": medians[GHOST] / medians[DP],
        "seconds_hooks": medians[HOOKS],
        "seconds_ghost": medians[GHOST],
        "twin": twin,
        "rows": case.batch_size,
        "repeats": len(seconds[DP]),
        "spread": max(spread(values) for values in seconds.values()),
        "raw": {"seconds": seconds},
    }


def spread(seconds: Sequence[float]) -> float:
    """Upper over lower quartile; far above 1 where something else used the machine meanwhile."""
    lower, _, upper = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [*seconds, 0, *seconds]
    return upper / lower


@contextmanager
def steps_of(case: StepCase, ways: tuple[str, ...] = WAYS) -> Iterator[Mapping[str, Step]]:
    """One callable per way that takes one step of training on the same rows."""
    data = _data(case)
    with ExitStack() as stack:
        makers = {
            SGD: lambda: _plain(case, data, torch.contiguous_format),
            SGD_CHANNELS_LAST: lambda: _plain(case, data, torch.channels_last),
            DP: lambda: _ours(case, data, stack),
            HOOKS: lambda: _opacus_hooks(case, data),
            GHOST: lambda: _opacus_ghost(case, data),
        }
        yield {way: makers[way]() for way in ways}


def _data(case: StepCase) -> _Data:
    """Random rows; where the case is ragged, patients with two to five rows each."""
    generator = torch.Generator().manual_seed(0)
    lengths = np.ones(case.batch_size, dtype=np.int64)
    if case.ragged:
        lengths = np.random.default_rng(0).integers(2, 6, case.batch_size)
    segments = np.repeat(np.arange(case.batch_size), lengths)[: case.batch_size]
    shape = (case.batch_size, case.channels, case.image_size, case.image_size)
    return _Data(
        inputs=torch.randn(shape, generator=generator),
        targets=torch.randint(0, len(CLASSES), (case.batch_size,), generator=generator),
        segments=segments,
        num_units=int(segments[-1]) + 1,
    )


def _model(case: StepCase) -> nn.Module:
    spec = ModelSpec(
        name=case.model, channels=case.channels, image_size=case.image_size, num_outputs=len(CLASSES)
    )
    model = build_model(spec)
    load_parameters(model, initial_parameters(spec, seed=0))
    return model.train()


def _plain(case: StepCase, data: _Data, memory_format: torch.memory_format) -> Step:
    model = _model(case).to(memory_format=memory_format)
    inputs = data.inputs.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), data.targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _ours(case: StepCase, data: _Data, stack: ExitStack) -> Step:
    model, task, training = _model(case), make_task("classification", CLASSES), TrainingConfig()
    plan = PrivacyPlan(
        sampling_rate=0.5,
        l2_clip_norm=CLIP,
        noise_multiplier=NOISE_MULTIPLIER,
        steps=10**9,
        enrolled_units=2 * data.num_units,
        max_rows_per_unit=5,
        unit="patient",
    )
    max_rows = rows_per_chunk(
        model,
        tuple(data.inputs.shape[1:]),
        physical_batch_size=training.physical_batch_size,
        max_rows_per_unit=plan.max_rows_per_unit,
    )
    wrapped = stack.enter_context(per_row_gradients(model))
    optimizer = PatientDPOptimizer(
        make_optimizer(model.parameters(), training, learning_rate=LEARNING_RATE),
        plan=plan,
        randomness=SecureRandomness(),
        round_number=1,
    )
    rows = np.arange(case.batch_size)

    def step() -> None:
        for chunk in chunks_of_units(rows, data.segments, max_rows=max_rows):
            accumulate_clipped_gradients(
                wrapped,
                task,
                optimizer,
                inputs=filled(data.inputs[chunk.rows], max_rows),
                targets=filled(data.targets[chunk.rows], max_rows),
                segments=torch.from_numpy(chunk.segments),
                num_units=chunk.num_units,
            )
        optimizer.step()

    return step


def _opacus_hooks(case: StepCase, data: _Data) -> Step:
    """What `make_private` sets up by default; it clips rows, whoever they belong to."""
    wrapped = GradSampleModule(_model(case))
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP,
        expected_batch_size=case.batch_size,
    )

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(data.inputs), data.targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _opacus_ghost(case: StepCase, data: _Data) -> Step:
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
        optimizer.zero_grad()
        criterion(wrapped(data.inputs), data.targets).backward()
        optimizer.step()

    return step
