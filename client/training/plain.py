"""Training in a hospital without differential privacy, and what both kinds of training share.

It must be asked for by name and no privacy may be claimed for its result. `client.training.private` is the
default.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from client.training.adam_bc import AdamBC, noise_variance
from client.training.augmentation import augment_of_step
from client.training.batches import input_tensor, minibatches, target_tensor
from client.training.copies import copies_of
from common.augmentation import OFF, AugmentationSection
from common.config import TrainingConfig
from common.errors import ConfigError, FederationError, RefusalCode
from common.examples import Examples
from common.models.registry import read_parameters
from common.parameters import Parameters
from common.preprocessing import Preprocessing
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import RandomnessSource
from common.schedule import learning_rate
from common.tasks import Task


class TrainingStopped(FederationError):  # noqa: N818 - it was asked for, it is not a defect
    """Training was asked to stop between two steps: nothing is released, a charge already made stands."""

    refusal = RefusalCode.LATE


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a hospital has after the local steps of one round."""

    parameters: Parameters
    """Weights after the last step, float32, on the CPU."""
    steps: int
    """Optimiser steps that ran; a public number."""
    started_at: float
    """Unix seconds."""
    ended_at: float
    """Unix seconds."""


def never() -> bool:
    """Do not stop."""
    return False


def stop_if_asked(stop: Callable[[], bool], *, step: int, steps: int) -> None:
    """Raise TrainingStopped when `stop` says so."""
    if stop():
        raise TrainingStopped(
            f"training was stopped after {step} of {steps} steps",
            why="the deadline passed or somebody stopped this hospital",
            fix="nothing was released; the round can be asked for again",
        )


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    training: TrainingConfig,
    *,
    learning_rate: float,
    privacy: PrivacyPlan | None = None,
) -> Optimizer:
    """Build the optimiser with fresh state and no weight decay of its own (see `decay_weights`).

    `privacy` is the plan whose noise is in the gradients. Raises ConfigError for `adam-bc` without one.
    """
    if training.optimizer == "adam-bc":
        if privacy is None:
            raise ConfigError(
                "adam-bc needs the noise of a private run", fix="take training.optimizer = adam"
            )
        variance, floor = noise_variance(privacy), training.adam_bc_floor
        return AdamBC(parameters, lr=learning_rate, noise_variance=variance, floor=floor)
    if training.optimizer == "rmsprop":
        return RMSprop(parameters, lr=learning_rate)
    if training.optimizer == "adam":
        return Adam(parameters, lr=learning_rate)
    return SGD(parameters, lr=learning_rate, momentum=training.momentum)


@torch.no_grad()
def decay_weights(parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float) -> None:
    """Shrink the weights by the factor 1 - learning_rate * weight_decay; looks at no record.

    Decoupled from the gradient, hence from its noise and from Adam's moments.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.
    """
    if weight_decay > 0:
        for parameter in parameters:
            parameter.mul_(1 - learning_rate * weight_decay)


def train(
    *,
    model: nn.Module,
    task: Task,
    examples: Examples,
    preprocessing: Preprocessing,
    training: TrainingConfig,
    local_steps: int,
    round_number: int,
    num_rounds: int,
    randomness: RandomnessSource,
    device: torch.device,
    augmentation: AugmentationSection = OFF,
    stop: Callable[[], bool] = never,
) -> TrainingResult:
    """Train `model` in place for `local_steps` minibatches. NOT private: the result may reveal patients.

    The same bits for the same arguments, ReproducibleRandomness, thread count and machine type.
    Raises TrainingStopped between two steps.
    """
    started_at = time.time()
    model.to(device).train()
    rate = learning_rate(training, round_number=round_number, num_rounds=num_rounds)
    optimizer = make_optimizer(model.parameters(), training, learning_rate=rate)
    batches = minibatches(
        examples.num_rows,
        batch_size=training.batch_size,
        steps=local_steps,
        randomness=randomness,
        round_number=round_number,
    )
    for step, batch in enumerate(batches):
        stop_if_asked(stop, step=step, steps=local_steps)
        # 1. The gradient of the mean loss, a chunk that fits in memory at a time.
        optimizer.zero_grad()
        augment = augment_of_step(
            augmentation, preprocessing, randomness, round_number=round_number, step=step
        )
        numbers, _ = copies_of(batch, batch, each=training.augmentations)
        for start in range(0, len(numbers), training.physical_batch_size):
            here = numbers[start : start + training.physical_batch_size]
            rows, copies = np.divmod(here, training.augmentations)
            inputs = input_tensor(examples, rows, preprocessing=preprocessing, device=device)
            if augment is not None:
                inputs = augment(inputs, rows, copies)
            losses = task.losses(model(inputs), target_tensor(examples, rows, device=device))
            _backward(losses.sum() / len(numbers))
        # 2. The step.
        decay_weights(model.parameters(), learning_rate=rate, weight_decay=training.weight_decay)
        optimizer.step()
    return TrainingResult(
        parameters=read_parameters(model), steps=local_steps, started_at=started_at, ended_at=time.time()
    )


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
