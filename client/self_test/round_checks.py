"""The check of the self-test on whole rounds: several steps as in production, compared with plain sums."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client.self_test.checks import ALPHA, p_of_variance
from client.self_test.setup import Setup, Vector, few_units, flat, noted_gradients, steps_tried
from client.training import private as private_training
from client.training.batches import input_tensor, target_tensor
from client.training.patient_optimizer import AUTOMATIC_STABILITY
from client.training.plain import decay_weights, make_optimizer
from common.config import PublicPlan
from common.examples import Examples
from common.models.registry import load_parameters, parameter_template, read_parameters
from common.parameters import Parameters, difference
from common.privacy.randomness import RandomnessSource, ReproducibleRandomness
from common.schedule import learning_rate
from common.tasks import Task

_FAINT = 1e-7
"""Losses so much smaller are those of patients who are learned: their steps run like others."""


def check_release(setup: Setup) -> str:
    """What leaves is the trainable parameters, moved by each step's noised gradients and nothing else."""
    own = setup.inputs_of(few_units(setup))
    model = setup.model()
    # Everybody enters, so that something is there to be hidden; the divisor is about the same.
    expected = max(1, round(setup.privacy.expected_batch_size))
    privacy = replace(setup.privacy, sampling_rate=1.0, enrolled_units=expected, steps=steps_tried(model))
    setup = replace(setup, privacy=privacy, plan=_with_decay(setup))
    randomness = ReproducibleRandomness(secrets.randbits(128), "self-test")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    leaving, seen = _trained(setup, model, own, randomness)
    if difference(leaving, setup.weights).keys() != parameter_template(setup.plan.model_spec).keys():
        return "something other than the model's trainable parameters would leave"
    if any(not torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers()):
        return "a buffer of the model changed while it saw patients"
    if len(seen) != setup.privacy.event().steps:
        return "not as many noised steps ran as are charged"
    *before, replayed = _replayed(setup, seen)
    if any(not np.array_equal(replayed[name], array) for name, array in leaving.items()):
        return "the new weights are not explained by the noised gradients and the weight decay"
    # The same noise without any patient.
    load_parameters(model, setup.weights)
    _, seen_of_nobody = _trained(setup, model, own.select_units([]), randomness)
    if len(seen_of_nobody) != len(seen):
        return "without patients other steps ran than with them"
    for weights, step, nobody in zip(before, seen, seen_of_nobody, strict=True):
        load_parameters(model, weights)
        sums = _clipped_sum(setup, model, own)
        if why := _not_private(flat(step), flat(nobody), sums, setup=setup):
            return why
    load_parameters(model, setup.weights)
    _, seen = _trained(setup, model, own, randomness, task=_Faint(setup.task))
    return "" if len(seen) == privacy.steps else "fewer steps ran for patients who are learned"


@dataclass(frozen=True)
class _Faint:
    """A task whose losses are almost zero."""

    task: Task

    def __getattr__(self, name: str) -> object:
        return getattr(self.task, name)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.task.losses(outputs, targets) * _FAINT


def _with_decay(setup: Setup) -> PublicPlan:
    """The plan, with a weight decay also where it has none: a dropped one is seen only then."""
    training = setup.plan.training
    decay = training.weight_decay or 0.01 / training.learning_rate
    return setup.plan.model_copy(update={"training": training.model_copy(update={"weight_decay": decay})})


def _trained(
    setup: Setup,
    model: nn.Module,
    examples: Examples,
    randomness: RandomnessSource,
    *,
    task: Any = None,
) -> tuple[Parameters, list[list[Tensor]]]:
    """The weights after a round of these examples, and the gradients of each step."""
    with noted_gradients(model) as seen:
        result = private_training.train_privately(
            model=model,
            task=task or setup.task,
            examples=examples,
            preprocessing=setup.preprocessing,
            plan=setup.privacy,
            training=setup.plan.training,
            round_number=1,
            num_rounds=setup.plan.federation.rounds,
            randomness=randomness,
            device=setup.device,
        )
    return result.parameters, seen


def _replayed(setup: Setup, gradients: list[list[Tensor]]) -> Iterator[Parameters]:
    """The weights before each step and at last, by a fresh optimiser with these gradients alone."""
    model, training = setup.model(), setup.plan.training
    rate = learning_rate(training, round_number=1, num_rounds=setup.plan.federation.rounds)
    parameters = list(model.parameters())
    optimizer = make_optimizer(parameters, training, learning_rate=rate, privacy=setup.privacy)
    yield read_parameters(model)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        decay_weights(parameters, learning_rate=rate, weight_decay=training.weight_decay)
        optimizer.step()
        yield read_parameters(model)


def _clipped_sum(setup: Setup, model: nn.Module, examples: Examples) -> Vector:
    """The sum that a step should hide, by torch's autograd: patient after patient, nothing of ours."""
    clip, automatic = setup.privacy.l2_clip_norm, setup.privacy.clipping == "automatic"
    total = np.zeros(sum(parameter.numel() for parameter in model.parameters()))
    for unit in range(examples.num_units):
        rows = examples.unit_rows.of(unit)
        inputs = input_tensor(examples, rows, preprocessing=setup.preprocessing, device=setup.device)
        losses = setup.task.losses(model(inputs), target_tensor(examples, rows, device=setup.device))
        gradient = flat(torch.autograd.grad(losses.mean(), list(model.parameters())))
        norm = float(np.linalg.norm(gradient))
        if norm <= 1e18:  # others, and those that are not finite, count as zero
            short = clip / (norm + AUTOMATIC_STABILITY) if automatic else min(1.0, clip / max(norm, 1e-30))
            total += gradient * short
    return total


def _not_private(released: Vector, nobody: Vector, sums: Vector, *, setup: Setup) -> str:
    """Why a step on a few units, and one on none with the same noise, are not sum plus noise, or ""."""
    privacy = setup.privacy
    scale = privacy.expected_batch_size / (privacy.event().noise_multiplier * privacy.l2_clip_norm)
    if not p_of_variance(nobody * scale) > ALPHA:
        return "the optimiser received noise of another scale than charged"
    # float32 keeps 24 bits of each number.
    rounding = 2.0**-23 * float(np.linalg.norm(released) + np.linalg.norm(nobody))
    expected = sums / privacy.expected_batch_size
    off = float(np.linalg.norm(released - nobody - expected))
    # A fiftieth: kernels round differently, a neuron at its threshold may tip over.
    if not off <= 0.02 * float(np.linalg.norm(expected)) + 10 * rounding:
        return "the optimiser received other than the clipped gradients of this step's patients and its noise"
    return ""
