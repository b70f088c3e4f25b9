"""DP-SGD the slow way: one patient at a time with plain autograd, to compare the fast way with."""

import numpy as np
import torch
from torch import nn

from client.training.batches import chunks_of_units
from client.training.patient_optimizer import _PIECE, PatientDPOptimizer
from client.training.plain import make_optimizer
from client.training.private import accumulate_clipped_gradients, per_row_gradients
from common.config import TrainingConfig
from common.examples import Examples
from common.privacy.noise import NoiseGrid, integer_noise
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import ReproducibleRandomness
from common.tasks import make_task

TASK = make_task("classification", ("negative", "positive"))


def make_plan(**changes):
    numbers = dict(
        sampling_rate=0.5,
        l2_clip_norm=1.0,
        noise_multiplier=1.5,
        steps=1,
        enrolled_units=20,
        max_rows_per_unit=4,
        unit="patient",
    )
    return PrivacyPlan(**numbers | changes)


def small_network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4 * 4 * 4, 2),
        )


def random_rows(units, seed=0, shape=(1, 8, 8), classes=2):
    """float32 images and targets, one row for each entry of `units`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(len(units), *shape, generator=generator)
    return inputs, torch.randint(0, classes, (len(units),), generator=generator)


def examples_of(rows_per_unit, seed=0, size=8):
    units = np.repeat(np.arange(len(rows_per_unit)), rows_per_unit)
    rng = np.random.default_rng(seed)
    rng.shuffle(units)
    return Examples(
        inputs={"image": rng.integers(0, 256, (len(units), 1, size, size), dtype=np.uint8)},
        targets=rng.integers(0, 2, len(units)),
        units=units,
        unit_ids=tuple(f"patient {number}" for number in range(len(rows_per_unit))),
    )


def make_dp_optimizer(model, plan, *, randomness=None, training=None, rate=0.1, round_number=1):
    return PatientDPOptimizer(
        make_optimizer(model.parameters(), training or TrainingConfig(), learning_rate=rate),
        plan=plan,
        randomness=randomness or ReproducibleRandomness(0, "here"),
        round_number=round_number,
    )


def accumulate_all(wrapped, optimizer, inputs, targets, units, *, max_rows, task=TASK):
    """Feed rows through the production path, chunk by chunk; `units` never decreases."""
    rows = np.arange(len(units))
    for chunk in chunks_of_units(rows, np.asarray(units), max_rows=max_rows):
        accumulate_clipped_gradients(
            wrapped,
            task,
            optimizer,
            inputs=inputs[chunk.rows].clone(),
            targets=targets[chunk.rows],
            segments=torch.from_numpy(chunk.segments),
            num_units=chunk.num_units,
        )
    optimizer.settle()


def summed(model):
    """`summed_grad` of all parameters as one float64 vector; zeros where nothing was accumulated."""
    return torch.cat(
        [
            (torch.zeros(p.shape) if p.summed_grad is None else p.summed_grad).double().flatten()
            for p in model.parameters()
        ]
    )


def clipped_sum(model, inputs, targets, units, *, clip=1.0, max_rows=1000, task=TASK, clipping="flat"):
    """The fast way: what the optimiser holds just before the noise."""
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan(l2_clip_norm=clip, clipping=clipping))
        accumulate_all(wrapped, optimizer, inputs, targets, units, max_rows=max_rows, task=task)
        return summed(model)


def patient_gradient(model, inputs, targets, task=TASK):
    """Gradient of one patient's mean loss as one float64 vector."""
    loss = task.losses(model(inputs), targets).mean()
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def oracle_clipped_sum(model, inputs, targets, units, *, clip=1.0, task=TASK, clipping="flat"):
    """The slow way."""
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    units = torch.as_tensor(units)
    for unit in units.unique():
        gradient = patient_gradient(model, inputs[units == unit], targets[units == unit], task)
        norm = float(gradient.norm())
        total += gradient * (min(1.0, clip / norm) if clipping == "flat" else clip / (norm + 0.01))
    return total


def noise_of_step(model, plan, randomness, *, step=0, round_number=1):
    """Noise that a step adds to the sum, as one float64 vector; the distribution has tests of its own."""
    grid = NoiseGrid.of(plan, num_parameters=sum(p.numel() for p in model.parameters()))
    lengths = [
        min(_PIECE, p.numel() - start) for p in model.parameters() for start in range(0, p.numel(), _PIECE)
    ]
    each = [
        integer_noise(
            length,
            grid=grid,
            stream=randomness.stream(purpose="noise", round_number=round_number, step=step, part=part),
        )
        for part, length in enumerate(lengths)
    ]
    return torch.from_numpy(np.concatenate(each) * grid.spacing)


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())
