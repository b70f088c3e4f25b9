"""Memory of a step: no gradient of each row where its factors do, and nothing of a chunk outlives it."""

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from client.training.batches import filled
from client.training.private import accumulate_clipped_gradients, per_row_gradients, private_steps
from common.config import TrainingConfig
from common.privacy.randomness import SecureRandomness
from tests.client.training.dp_oracle import TASK, make_dp_optimizer, make_plan, random_rows
from tests.client.training.test_per_row_layers import RAGGED, deep_network


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation puts out, in numbers."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        found = function(*arguments, **(named or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, torch.Tensor) and value._base is None and 0 not in value.stride():
                self.numbers = max(self.numbers, value.numel())
        return found


def largest_tensor(model, shape, rows):
    inputs, targets = random_rows(range(rows), shape=shape)
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan())
        with Largest() as largest:
            accumulate_clipped_gradients(
                wrapped,
                TASK,
                optimizer,
                inputs=inputs,
                targets=targets,
                segments=torch.arange(rows),
                num_units=rows,
            )
            optimizer.settle()
        assert all(parameter.grad_sample is None for parameter in model.parameters())
    return largest.numbers


def test_no_gradient_of_each_row_is_formed_where_factors_do():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 2))
    assert largest_tensor(linear, (1, 20, 20), 64) <= 400 * 300
    deep = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Flatten(), nn.Linear(4 * 128, 2))
    weights = 9 * 64 * 128
    assert largest_tensor(deep, (64, 4, 4), 64) <= max(weights, 64 * 4 * 9 * 64)
    # Sixteen times as many numbers, where each row had its own.
    assert max(weights, 64 * 4 * 9 * 64) * 16 <= 64 * weights


def test_rows_of_a_way_are_freed_with_their_chunk():
    model = deep_network()
    inputs, targets = random_rows(RAGGED)
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan())
        for _ in range(3):
            accumulate_clipped_gradients(
                wrapped,
                TASK,
                optimizer,
                inputs=inputs,
                targets=targets,
                segments=torch.from_numpy(RAGGED),
                num_units=4,
            )
            assert all(parameter.grad_sample is None for parameter in model.parameters())
            assert not any(name for layer in model.modules() for name in vars(layer) if "activation" in name)


def test_between_steps_a_large_network_keeps_neither_sums_nor_what_was_released():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2048, 2048), nn.Linear(2048, 2))
    rows = np.arange(6)
    images, targets = torch.rand(6, 1, 32, 64), torch.zeros(6, dtype=torch.int64)
    with private_steps(
        model,
        TASK,
        plan=make_plan(steps=2),
        training=TrainingConfig(),
        round_number=1,
        num_rounds=1,
        input_shape=(1, 32, 64),
        randomness=SecureRandomness(),
    ) as steps:
        for _ in range(2):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            steps.clip(rows, rows, load=lambda some, n: (filled(images[some], n), filled(targets[some], n)))
            steps.update()
            assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))
            weight = model[1].weight
            assert weight.grad is None
            assert weight.summed_grad is None
            assert weight.numel() not in [kept.numel() for kept in steps.optimizer._sums._zeroed.values()]
