"""DP-SGD in a hospital: the local steps of one round, patient by patient.

Guarantee: the weights in the TrainingResult are (with the weights at the start) a function of the noised
releases of `plan.steps` steps, each a Poisson-subsampled Gaussian mechanism with sampling rate q and noise
multiplier sigma of the plan, for adding or removing one unit (patient). Nothing else in the result depends on
the patients, except the time it took. The caller charges `plan.event()` before.

That a unit's clipped gradient has the same bits whoever else enters, whatever the weights, rests on chunks of
one public shape (`client.training.batches`), computed by one number of threads, and on kernels that treat all
places in a chunk alike. The latter is tried with random numbers (`client.training.row_places`); where it is
not so, each unit gets a chunk of its own.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModuleNoOp
from torch import Tensor, nn

from client.training.augmentation import augment_of_step
from client.training.batches import (
    Chunk,
    chunks_of_units,
    rows_per_chunk,
    sampled_rows,
)
from client.training.copies import copies_of, loaded
from client.training.guard import guard_losses, guard_model, guard_optimizer
from client.training.kept_memory import hand_back, kept_memory
from client.training.lanes import copy_beside, lanes_for, side_by_side
from client.training.patient_optimizer import PatientDPOptimizer
from client.training.per_row_layers import with_row_gradients
from client.training.plain import (
    TrainingResult,
    decay_weights,
    make_optimizer,
    never,
    stop_if_asked,
)
from client.training.row_places import place_matters
from common.augmentation import OFF, AugmentationSection
from common.config import TrainingConfig
from common.examples import Examples
from common.models.registry import read_parameters
from common.preprocessing import Preprocessing
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import RandomnessSource, Stream
from common.privacy.sampling import poisson_sample
from common.schedule import learning_rate
from common.series import row_shape
from common.tasks import Task


def train_privately(
    *,
    model: nn.Module,
    task: Task,
    examples: Examples,
    preprocessing: Preprocessing,
    plan: PrivacyPlan,
    training: TrainingConfig,
    round_number: int,
    num_rounds: int,
    randomness: RandomnessSource,
    device: torch.device,
    augmentation: AugmentationSection = OFF,
    stop: Callable[[], bool] = never,
) -> TrainingResult:
    """Train `model` in place for `plan.steps` steps of DP-SGD; see the module for the guarantee.

    The model comes plain and leaves plain. With ReproducibleRandomness (which voids the guarantee) the result
    has the same bits for the same arguments, thread count and machine type; torch's global generator is never
    used. Raises GuardError or BatchNormError for a set-up without a guarantee, TrainingStopped between steps.
    """
    started_at = time.time()
    model.to(device).train()
    # 1. Refuse what would void the guarantee.
    guard_losses(task)
    guard_model(model, input_shape=row_shape(examples.inputs))
    with private_steps(
        model,
        task,
        plan=plan,
        training=training,
        round_number=round_number,
        num_rounds=num_rounds,
        input_shape=row_shape(examples.inputs),
        randomness=randomness,
    ) as steps:
        guard_optimizer(steps.optimizer, steps.wrapped, plan)
        for step in range(plan.steps):
            stop_if_asked(stop, step=step, steps=plan.steps)
            # 2. Every patient enters with probability q; a patient with many images sends a few of them.
            stream = randomness.stream(purpose="sampling", round_number=round_number, step=step)
            rows, segments = rows_of_step(examples, plan, stream)
            # 3. Clip each patient's gradient and add it up, a chunk that fits in memory at a time.
            augment = augment_of_step(
                augmentation, preprocessing, randomness, round_number=round_number, step=step
            )
            each = training.augmentations
            load = partial(loaded, examples, preprocessing, device, augment, each)
            steps.clip(*copies_of(rows, segments, each=each), load=load)
            # 4. Add the noise and step.
            steps.update()
    return TrainingResult(
        parameters=read_parameters(model),
        steps=steps.optimizer.steps_taken,
        started_at=started_at,
        ended_at=time.time(),
    )


_MANY_WEIGHTS = 2**22
"""The memory of chunks, and that of sums and noise, would lie beside each other if both were kept."""
Load = Callable[[NDArray[np.int64], int], tuple[Tensor, Tensor]]
"""Inputs and targets of some copies of rows (as `copies_of` numbers them), filled up to a number of rows."""


@contextmanager
def private_steps(
    model: nn.Module,
    task: Task,
    *,
    plan: PrivacyPlan,
    training: TrainingConfig,
    round_number: int,
    num_rounds: int,
    input_shape: tuple[int, ...],
    randomness: RandomnessSource,
) -> Iterator["PrivateSteps"]:
    """Prepare `model` for the steps of a round; it is plain again afterwards, errors or not."""
    device = next(model.parameters()).device
    lanes, fixed = lanes_for(device), not randomness.private
    rows = partial(
        rows_per_chunk,
        model,
        input_shape,
        max_rows_per_unit=plan.max_rows_per_unit * training.augmentations,
        expected_units=plan.expected_batch_size,
        lanes=lanes,
    )
    chunk_rows = rows(physical_batch_size=training.physical_batch_size)
    # Tried in a lane, with the kernels that a lane takes.
    tried = partial(place_matters, model, input_shape=input_shape, rows=chunk_rows, fixed_kernels=fixed)
    alone = side_by_side([tried], lanes=lanes)[0]
    if alone:
        chunk_rows = rows(physical_batch_size=1)
    rate = learning_rate(training, round_number=round_number, num_rounds=num_rounds)
    with ExitStack() as stack:
        stack.enter_context(kept_memory())
        copies = [copy_beside(model) for _ in range(lanes - 1)]
        networks = [
            stack.enter_context(per_row_gradients(one, fixed_kernels=fixed)) for one in (model, *copies)
        ]
        trainable = trainable_parameters(model)
        optimizer = PatientDPOptimizer(
            make_optimizer(trainable, training, learning_rate=rate, privacy=plan),
            plan=plan,
            randomness=randomness,
            round_number=round_number,
        )
        for one in networks[1:]:
            optimizer.include(trainable_parameters(one))
        yield PrivateSteps(
            networks=tuple(networks),
            optimizer=optimizer,
            task=task,
            chunk_rows=chunk_rows,
            alone=alone,
            decay=partial(decay_weights, trainable, learning_rate=rate, weight_decay=training.weight_decay),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PrivateSteps:
    """The steps of one round: for each, `clip` and then `update`."""

    networks: tuple[GradSampleModuleNoOp, ...]
    """One for each lane; all share the weights of the first."""
    optimizer: PatientDPOptimizer
    task: Task
    chunk_rows: int
    """Rows of every chunk, filled up."""
    alone: bool
    """Whether each unit has a chunk of its own."""
    decay: Callable[[], None]
    """Weight decay of one step."""

    @property
    def wrapped(self) -> GradSampleModuleNoOp:
        """The network itself."""
        return self.networks[0]

    @property
    def model(self) -> nn.Module:
        """The network, without its wrapper."""
        model: nn.Module = self.wrapped._module
        return model

    def chunks(self, rows: NDArray[np.int64], segments: NDArray[np.int64]) -> list[Chunk]:
        """What is computed together of these rows."""
        return list(chunks_of_units(rows, segments, max_rows=1 if self.alone else self.chunk_rows))

    def clip(self, rows: NDArray[np.int64], segments: NDArray[np.int64], *, load: Load) -> None:
        """Add the clipped gradients of all units to the sum; `rows` and `segments` as `sampled_rows`."""
        chunks = enumerate(self.chunks(rows, segments))
        work = [partial(self._clip, number, chunk, load) for number, chunk in chunks]
        side_by_side(work, lanes=len(self.networks))

    def update(self) -> None:
        """Release the sum with its noise and take one step with it."""
        self.decay()
        is_large = sum(parameter.numel() for parameter in self.wrapped.parameters()) >= _MANY_WEIGHTS
        if is_large:
            hand_back()
        self.optimizer.step()
        if is_large:
            self.optimizer.forget_large_release()
            hand_back()

    def _clip(self, number: int, chunk: Chunk, load: Load) -> None:
        inputs, targets = load(chunk.rows, self.chunk_rows)
        accumulate_clipped_gradients(
            self.networks[number % len(self.networks)],
            self.task,
            self.optimizer,
            inputs=inputs,
            targets=targets,
            segments=torch.from_numpy(chunk.segments).to(inputs.device),
            num_units=chunk.num_units,
        )


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that are trained, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def rows_of_step(
    examples: Examples, plan: PrivacyPlan, stream: Stream
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the units that enter a step, int64 (rows,), and the segment of each, as `sampled_rows`."""
    units = poisson_sample(examples.num_units, plan.sampling_rate, stream)
    return sampled_rows(units, examples.unit_rows, max_rows_per_unit=plan.max_rows_per_unit, stream=stream)


@contextmanager
def per_row_gradients(model: nn.Module, *, fixed_kernels: bool = True) -> Iterator[GradSampleModuleNoOp]:
    """Wrap `model` for per-row gradients of a summed loss; it is plain again afterwards, errors or not.

    fixed_kernels: as `client.training.per_row_layers.with_row_gradients`.
    """
    wrapped = GradSampleModuleNoOp(model, loss_reduction="sum")
    try:
        with with_row_gradients(model, fixed_kernels=fixed_kernels):
            yield wrapped
    finally:
        wrapped.to_standard_module()
        for parameter in model.parameters():
            parameter.grad = None
            parameter.__dict__.pop("summed_grad", None)


def accumulate_clipped_gradients(
    wrapped: GradSampleModuleNoOp,
    task: Task,
    optimizer: PatientDPOptimizer,
    *,
    inputs: Tensor,
    targets: Tensor,
    segments: Tensor,
    num_units: int,
) -> None:
    """Add the clipped gradient of each unit to the optimiser's sum; a unit's loss is the mean of its rows.

    inputs: float32 (rows, ...). targets: int64 (rows, ...). segments: int64, one for each row of a unit;
    the rows after them only fill the chunk up. No row influences another unit's gradient.
    """
    own = len(segments)
    rows_of_unit = torch.bincount(segments, minlength=num_units)
    losses = task.losses(wrapped(inputs), targets)
    loss = (losses[:own] / rows_of_unit[segments]).sum()
    loss.backward()  # type: ignore[no-untyped-call]  # leaves no gradient of the whole chunk
    optimizer.accumulate(segments, num_units, parameters=trainable_parameters(wrapped))
