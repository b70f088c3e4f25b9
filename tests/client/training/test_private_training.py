import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from client.training.plain import TrainingStopped
from client.training.private import train_privately
from common.config import TrainingConfig
from common.errors import BatchNormError, GuardError
from common.models.registry import read_parameters
from common.parameters import parameters_sha256
from common.preprocessing import Preprocessing
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from common.privacy.sampling import poisson_sample
from common.tasks import Classification
from tests.client.training.dp_oracle import (
    TASK,
    examples_of,
    make_plan,
    noise_of_step,
    oracle_clipped_sum,
    relative_error,
    small_network,
)

RANDOMNESS = ReproducibleRandomness(7, "here")


def run(model, examples, plan, training=None, **changes):
    arguments = dict(
        model=model,
        task=TASK,
        examples=examples,
        preprocessing=Preprocessing(image_size=8, channels=1),
        plan=plan,
        training=training or TrainingConfig(),
        round_number=1,
        num_rounds=4,
        randomness=RANDOMNESS,
        device=torch.device("cpu"),
    )
    return train_privately(**arguments | changes)


def flat(parameters):
    return torch.cat([torch.from_numpy(array).double().flatten() for array in parameters.values()])


def oracle_round(examples, plan, *, rate, momentum=0.0, weight_decay=0.0, round_number=1):
    """DP-SGD as in the paper: plain loops, one patient at a time, float64 releases."""
    model = small_network()
    images = torch.from_numpy((examples.inputs["image"] / 255 - 0.5) / 0.25).float()
    targets = torch.from_numpy(examples.targets)
    velocity = 0
    for step in range(plan.steps):
        where = dict(round_number=round_number, step=step)
        stream = RANDOMNESS.stream(purpose="sampling", **where)
        units = poisson_sample(examples.num_units, plan.sampling_rate, stream)
        rows = torch.from_numpy(np.flatnonzero(np.isin(examples.units, units)))
        total = oracle_clipped_sum(
            model, images[rows], targets[rows], examples.units[rows.numpy()], clip=plan.l2_clip_norm
        )
        noise = noise_of_step(model, plan, RANDOMNESS, **where)
        gradient = (total + noise) / (plan.sampling_rate * plan.enrolled_units)
        velocity = momentum * velocity + gradient
        weights = flat(read_parameters(model)) * (1 - rate * weight_decay) - rate * velocity
        nn.utils.vector_to_parameters(weights.float(), model.parameters())
    return read_parameters(model)


@pytest.mark.parametrize("physical_batch_size", [1, 5, 256])
@pytest.mark.parametrize("q", [0.4, 1.0])
def test_a_round_is_dp_sgd_as_in_the_paper(physical_batch_size, q):
    examples = examples_of([1, 5, 2, 1, 4, 3, 2, 1])
    plan = make_plan(
        sampling_rate=q,
        steps=4,
        enrolled_units=10,
        max_rows_per_unit=5,
        l2_clip_norm=0.4,
        noise_multiplier=0.2,
    )
    training = TrainingConfig(
        learning_rate=0.3,
        momentum=0.5,
        weight_decay=0.1,
        physical_batch_size=physical_batch_size,
        learning_rate_schedule="cosine",
    )
    found = run(small_network(), examples, plan, training, round_number=3)
    expected = oracle_round(examples, plan, rate=0.15, momentum=0.5, weight_decay=0.1, round_number=3)
    start = flat(read_parameters(small_network()))
    assert relative_error(flat(found.parameters) - start, flat(expected) - start) < 1e-4
    assert found.steps == 4
    assert 0 < found.started_at <= found.ended_at


def test_trap_9_a_hospital_without_patients_releases_noise_alone():
    empty = examples_of([])
    plan = make_plan(steps=3)
    found = flat(run(small_network(), empty, plan, TrainingConfig(learning_rate=1.0)).parameters)
    moved = found - flat(read_parameters(small_network()))
    noise = sum(noise_of_step(small_network(), plan, RANDOMNESS, step=step) for step in range(3))
    assert relative_error(moved, -noise / 10) < 1e-5


class CountingTask(Classification):
    """Notes how many records each training forward sees, and their targets."""

    def losses(self, outputs, targets):
        if outputs.requires_grad:  # the guard's probe does not
            SEEN.append(len(targets))
        return super().losses(outputs, targets)


SEEN: list[int] = []


def test_at_most_k_images_of_a_patient_enter_a_step():
    SEEN.clear()
    plan = make_plan(sampling_rate=1.0, max_rows_per_unit=3, steps=2)
    run(small_network(), examples_of([9, 1, 4]), plan, task=CountingTask(classes=TASK.classes))
    assert SEEN == [64] * 2


def test_physical_batches_are_bounded_and_change_only_rounding():
    examples, plan = examples_of([1, 5, 2, 1, 4, 3]), make_plan(sampling_rate=1.0, max_rows_per_unit=5)
    results = []
    for physical_batch_size in (2, 256):
        SEEN.clear()
        training = TrainingConfig(physical_batch_size=physical_batch_size)
        task = CountingTask(classes=TASK.classes)
        results.append(flat(run(small_network(), examples, plan, training, task=task).parameters))
        # All of one shape; where the place among 8 rows matters, each of the 6 patients is alone.
        assert SEEN in ([[8] * 3, [8] * 6] if physical_batch_size == 2 else [[64]])
    assert relative_error(results[0], results[1]) < 1e-5


def test_hospitals_rounds_and_restarts_differ():
    examples, plan = examples_of([1] * 6), make_plan()
    results = [
        run(small_network(), examples, plan, randomness=randomness, round_number=round_number)
        for randomness, round_number in [
            (ReproducibleRandomness(7, "here"), 1),
            (ReproducibleRandomness(7, "there"), 1),
            (ReproducibleRandomness(7, "here"), 2),
            (SecureRandomness(), 1),
            (SecureRandomness(), 1),
        ]
    ]
    assert len({parameters_sha256(result.parameters) for result in results}) == 5


def test_the_model_leaves_plain_and_can_be_trained_again():
    model, examples, plan = small_network(), examples_of([1] * 6), make_plan()
    names = [name for name, _ in model.named_parameters()]
    first = run(model, examples, plan)
    assert [name for name, _ in model.named_parameters()] == names == list(first.parameters)
    for layer in model.modules():
        assert not layer._forward_hooks
        assert not layer._backward_hooks
        assert not {"activations", "max_batch_len"} & set(vars(layer))
    assert all(not hasattr(p, "grad_sample") and not hasattr(p, "summed_grad") for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    nn.utils.vector_to_parameters(flat(read_parameters(small_network())).float(), model.parameters())
    again = run(model, examples, plan)
    assert parameters_sha256(again.parameters) == parameters_sha256(first.parameters)


def test_stopping_releases_nothing_and_leaves_the_model_usable():
    model, asked = small_network(), iter([False, True])
    with pytest.raises(TrainingStopped, match="1 of 3"):
        run(model, examples_of([1] * 6), make_plan(steps=3), stop=lambda: next(asked))
    assert run(model, examples_of([1] * 6), make_plan(steps=3)).steps == 3


def test_an_error_in_mid_batch_leaves_nothing_for_the_next_round():
    class Failing(CountingTask):
        def losses(self, outputs, targets):
            if outputs.requires_grad and len(SEEN) == 2:
                raise MemoryError
            return super().losses(outputs, targets)

    SEEN.clear()
    model, examples = small_network(), examples_of([2] * 8)
    plan, training = make_plan(sampling_rate=1.0), TrainingConfig(physical_batch_size=4)
    with pytest.raises(MemoryError):
        run(model, examples, plan, training, task=Failing(classes=TASK.classes))
    assert all(not {"activations", "max_batch_len"} & set(vars(layer)) for layer in model.modules())
    assert flat(read_parameters(model)).equal(flat(read_parameters(small_network())))
    after_error, fresh = run(model, examples, plan, training), run(small_network(), examples, plan, training)
    assert parameters_sha256(after_error.parameters) == parameters_sha256(fresh.parameters)


def test_what_the_guard_refuses_is_not_trained():
    batch_norm = nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(BatchNormError, match="BatchNorm2d"):
        run(batch_norm, examples_of([1] * 6), make_plan())

    class MeanLoss(Classification):
        def losses(self, outputs, targets):
            return super().losses(outputs, targets).mean()

    model = small_network()
    with pytest.raises(GuardError, match="losses"):
        run(model, examples_of([1] * 6), make_plan(), task=MeanLoss(classes=TASK.classes))
    assert flat(read_parameters(model)).equal(flat(read_parameters(small_network())))


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[1]))
from common.parameters import parameters_sha256
from tests.client.training.test_private_training import reproducible_result
print(parameters_sha256(reproducible_result().parameters))
"""


def reproducible_result():
    plan = make_plan(steps=3, max_rows_per_unit=2)
    training = TrainingConfig(optimizer="adam", physical_batch_size=4)
    return run(small_network(), examples_of([1, 5, 2, 1, 4, 3]), plan, training)


def test_reproducible_training_has_the_same_bits_in_another_process():
    root = Path(__file__).resolve().parents[3]
    found = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, seed],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.use_deterministic_algorithms(True)
        here = parameters_sha256(reproducible_result().parameters)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert found == [here, here]
    assert len(here) == 64
