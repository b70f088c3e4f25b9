"""Chunks side by side: the same sums and the same bits, whichever lane computes them."""

import multiprocessing
import threading

import numpy as np
import pytest
import torch
from torch import nn

from client.training.batches import filled
from client.training.lanes import copy_beside, lanes_for, side_by_side
from client.training.private import per_row_gradients, private_steps
from common.config import TrainingConfig
from common.errors import GuardError
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from tests.client.training.dp_oracle import (
    TASK,
    make_dp_optimizer,
    make_plan,
    oracle_clipped_sum,
    random_rows,
    relative_error,
    small_network,
    summed,
)

RAGGED = np.repeat(np.arange(20), np.random.default_rng(0).integers(1, 4, 20))


@pytest.fixture(params=[1, 2, 3])
def lanes(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def sum_of(model, *, clip=0.3, randomness=None, rows=None, threads=None, physical_batch_size=12):
    """Clipped sum of one step of everybody, or of `rows` of them."""
    chosen = np.arange(len(RAGGED)) if rows is None else np.asarray(rows)
    inputs, targets = random_rows(RAGGED)
    plan = make_plan(l2_clip_norm=clip, max_rows_per_unit=3)
    with private_steps(
        model,
        TASK,
        plan=plan,
        training=TrainingConfig(learning_rate=0.1, physical_batch_size=physical_batch_size),
        round_number=1,
        num_rounds=1,
        input_shape=tuple(inputs.shape[1:]),
        randomness=randomness or SecureRandomness(),
    ) as steps:
        steps.clip(chosen, RAGGED[chosen], load=lambda r, n: (filled(inputs[r], n), filled(targets[r], n)))
        steps.optimizer.settle()
        return summed(model)


def test_the_sum_is_that_of_every_unit_alone(lanes):
    model = small_network()
    inputs, targets = random_rows(RAGGED)
    expected = oracle_clipped_sum(model, inputs, targets, RAGGED, clip=0.3)
    assert relative_error(sum_of(model), expected) < 1e-5


def test_the_bits_come_again_although_lanes_race(lanes):
    found = [sum_of(small_network(), randomness=ReproducibleRandomness(1, "here")) for _ in range(5)]
    assert all(torch.equal(found[0], again) for again in found[1:])


def test_a_units_gradient_has_the_same_bits_in_every_lane(lanes):
    """Alone in the first chunk, or in later ones behind others whose gradients are all zero."""
    patient = np.flatnonzero(RAGGED == 7)
    expected = sum_of(small_network(), rows=patient)

    def behind(number):
        """Chunks of 4 rows: the patient is in chunk `number`, everything before it has no influence."""
        inputs, targets = random_rows(RAGGED)
        nobody = torch.full((4 * number, *inputs.shape[1:]), float("nan"))
        every = torch.cat([nobody, inputs[patient]])
        labels = torch.cat([torch.zeros(4 * number, dtype=torch.int64), targets[patient]])
        segments = np.concatenate([np.arange(4 * number), np.full(len(patient), 4 * number)])
        model = small_network()
        with private_steps(
            model,
            TASK,
            plan=make_plan(l2_clip_norm=0.3, max_rows_per_unit=3),
            training=TrainingConfig(learning_rate=0.1, physical_batch_size=4 * lanes),
            round_number=1,
            num_rounds=1,
            input_shape=tuple(inputs.shape[1:]),
            randomness=SecureRandomness(),
        ) as steps:
            assert steps.chunk_rows == 4
            steps.clip(
                np.arange(len(every)), segments, load=lambda r, n: (filled(every[r], n), filled(labels[r], n))
            )
            steps.optimizer.settle()
            return summed(model)

    found = [behind(number) for number in range(4)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert relative_error(found[0], expected) < 1e-5


def test_training_goes_on_from_the_weights_that_all_lanes_share(lanes):
    """Two steps: the second sees what the first has changed, in every lane."""
    model = small_network()
    inputs, targets = random_rows(RAGGED)
    rows = np.arange(len(RAGGED))
    with private_steps(
        model,
        TASK,
        plan=make_plan(steps=2, max_rows_per_unit=3),
        training=TrainingConfig(learning_rate=0.5, physical_batch_size=12),
        round_number=1,
        num_rounds=1,
        input_shape=tuple(inputs.shape[1:]),
        randomness=SecureRandomness(),
    ) as steps:
        for _ in range(2):
            steps.clip(rows, RAGGED, load=lambda r, n: (filled(inputs[r], n), filled(targets[r], n)))
            steps.optimizer.settle()
            plain = small_network()
            plain.load_state_dict(model.state_dict())
            expected = oracle_clipped_sum(plain, inputs, targets, RAGGED, clip=1.0)
            assert relative_error(summed(model), expected) < 1e-5
            steps.update()
    assert all(not hasattr(p, "grad_sample") and p.grad is None for p in model.parameters())


def test_every_lane_has_one_thread_and_the_process_keeps_its_own(lanes):
    assert lanes_for(torch.device("cpu")) == lanes
    numbers = side_by_side([torch.get_num_threads] * 7, lanes=lanes)
    assert numbers == [1] * 7
    assert torch.get_num_threads() == lanes
    together = threading.Barrier(lanes, timeout=10)
    assert len(side_by_side([together.wait] * lanes, lanes=lanes)) == lanes


def test_results_come_in_order_and_the_first_fault_is_raised_when_all_have_ended(lanes):
    assert side_by_side([lambda i=i: i for i in range(8)], lanes=lanes) == list(range(8))
    assert side_by_side([], lanes=lanes) == []
    done = []

    def work(number):
        if number == 1:
            raise ValueError("the second")
        done.append(number)

    with pytest.raises(ValueError, match="the second"):
        side_by_side([lambda i=i: work(i) for i in range(6)], lanes=lanes)
    assert 0 in done
    before = len(done)
    assert side_by_side([lambda: len(done)], lanes=lanes) == [before]


def test_a_copy_shares_weights_and_buffers_and_nothing_else():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model.register_buffer("fixed", torch.ones(2))
    copied = copy_beside(model)
    assert copied.fixed is model.fixed
    for own, other in zip(model.parameters(), copied.parameters(), strict=True):
        assert own is not other
        assert own.data_ptr() == other.data_ptr()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(model[0].weight, copied[0].weight)
    copied(torch.ones(1, 3)).sum().backward()
    assert model[0].weight.grad is None


def test_a_copy_with_weights_of_its_own_is_refused():
    optimizer = make_dp_optimizer(small_network(), make_plan())
    with pytest.raises(GuardError, match="other weights"):
        optimizer.include(list(small_network().parameters()))


def in_a_fork(connection):
    connection.send(side_by_side([lambda number=number: number for number in range(5)], lanes=2))


def test_a_fork_makes_lanes_of_its_own():
    """It has none of its parent's threads: their queue would take its work and never do it."""
    side_by_side([int, int], lanes=2)
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=in_a_fork, args=(there,))
    child.start()
    try:
        assert here.poll(20)
        assert here.recv() == [0, 1, 2, 3, 4]
    finally:
        child.terminate()
        child.join(10)


def test_a_gradient_that_was_forgotten_in_another_lane_ends_the_step():
    model = small_network()
    copied = copy_beside(model)
    optimizer = make_dp_optimizer(model, make_plan())
    optimizer.include(list(copied.parameters()))
    with per_row_gradients(copied) as wrapped:
        inputs, targets = random_rows([0, 1])
        TASK.losses(wrapped(inputs), targets).sum().backward()
        with pytest.raises(GuardError, match="not accumulated"):
            optimizer.step()
