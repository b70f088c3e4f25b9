"""Layers with row gradients: right in every use that the guard allows, nothing left behind, nothing large."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from client.training.batches import filled
from client.training.guard import guard_optimizer
from client.training.patient_optimizer import PatientDPOptimizer
from client.training.plain import make_optimizer
from client.training.private import accumulate_clipped_gradients, per_row_gradients
from client.training.row_gradients import DenseRows, ProductRows
from common.config import TrainingConfig
from common.errors import GuardError
from common.privacy.randomness import ReproducibleRandomness
from tests.client.training.dp_oracle import (
    TASK,
    clipped_sum,
    make_dp_optimizer,
    make_plan,
    oracle_clipped_sum,
    random_rows,
    relative_error,
    summed,
)

RAGGED = np.repeat(np.arange(4), [1, 4, 2, 1])


class Tokens(nn.Module):
    """(rows, 1, 6, 8) to (rows, 2): linear layers with several positions, and one after them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(8, 12), nn.LayerNorm(12)
        self.second = nn.Linear(12, 5, bias=False)
        self.last = nn.Linear(30, 2)

    def forward(self, inputs):
        hidden = torch.tanh(self.second(self.norm(torch.tanh(self.first(inputs.squeeze(1))))))
        return self.last(hidden.flatten(1))


def deep_network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, padding="same", groups=8),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8 * 64, 2),
        )


def exact(model, inputs, targets, units, clip):
    return oracle_clipped_sum(copy.deepcopy(model).double(), inputs.double(), targets, units, clip=clip)


@pytest.mark.parametrize("clip", [0.05, 1e3])
@pytest.mark.parametrize("max_rows", [4, 100])
def test_linear_layers_with_several_positions(clip, max_rows):
    model = Tokens()
    inputs, targets = random_rows(RAGGED, shape=(1, 6, 8))
    found = clipped_sum(model, inputs, targets, RAGGED, clip=clip, max_rows=max_rows)
    assert relative_error(found, exact(model, inputs, targets, RAGGED, clip)) < 1e-5


@pytest.mark.parametrize("filled_to", [8, 9, 64])
def test_rows_that_fill_a_chunk_up_count_for_nothing(filled_to):
    model = deep_network()
    inputs, targets = random_rows(RAGGED)
    expected = exact(model, inputs, targets, RAGGED, 0.3)
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan(l2_clip_norm=0.3))
        accumulate_clipped_gradients(
            wrapped,
            TASK,
            optimizer,
            inputs=filled(inputs, filled_to),
            targets=filled(targets, filled_to),
            segments=torch.from_numpy(RAGGED),
            num_units=4,
        )
        optimizer.settle()
        assert relative_error(summed(model), expected) < 1e-5


@pytest.mark.parametrize(
    "frozen", [["0.weight"], ["0.weight", "0.bias"], ["1.weight", "3.bias"], ["6.weight"]]
)
def test_frozen_weights_stay_and_the_others_have_their_gradient(frozen):
    model = deep_network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    inputs, targets = random_rows(RAGGED)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = 0
    for unit in range(4):
        rows = torch.from_numpy(unit == RAGGED)
        loss = TASK.losses(model(inputs[rows]), targets[rows]).mean()
        gradient = torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, trainable)])
        expected = expected + gradient * min(1.0, 0.3 / float(gradient.norm()))
    with per_row_gradients(model) as wrapped:
        optimizer = PatientDPOptimizer(
            make_optimizer(trainable, TrainingConfig(), learning_rate=0.1),
            plan=make_plan(l2_clip_norm=0.3),
            randomness=ReproducibleRandomness(0, "here"),
            round_number=1,
        )
        guard_optimizer(optimizer, wrapped, make_plan(l2_clip_norm=0.3))
        accumulate_clipped_gradients(
            wrapped,
            TASK,
            optimizer,
            inputs=inputs,
            targets=targets,
            segments=torch.from_numpy(RAGGED),
            num_units=4,
        )
        optimizer.settle()
        found = torch.cat([p.summed_grad.flatten() for p in trainable])
        assert relative_error(found, expected) < 1e-5
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen)


def test_the_forward_pass_is_that_of_the_plain_layers():
    for model, shape in ((deep_network(), (1, 8, 8)), (Tokens(), (1, 6, 8))):
        inputs, _ = random_rows(range(5), shape=shape)
        expected = model(inputs)
        with per_row_gradients(model) as wrapped:
            assert torch.allclose(wrapped(inputs), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_whole_batch_is_never_formed():
    model = deep_network()
    inputs, targets = random_rows(RAGGED)
    with per_row_gradients(model) as wrapped:
        TASK.losses(wrapped(inputs), targets).sum().backward()
        for parameter in model.parameters():
            assert parameter.grad is None
            assert isinstance(parameter.grad_sample, DenseRows | ProductRows)
            assert parameter.grad_sample.rows == len(inputs)


# --- nothing stays behind ---


def attributes(model):
    return {name: sorted(vars(layer)) for name, layer in model.named_modules()}


def is_plain(model, expected):
    for parameter in model.parameters():
        for name in ("grad", "grad_sample", "summed_grad"):
            assert getattr(parameter, name, None) is None
    assert attributes(model) == expected
    assert all("forward" not in vars(layer) for layer in model.modules())
    inputs, targets = random_rows(RAGGED)
    TASK.losses(model(inputs), targets).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("where", ["inside", "forward", "backward", "never"])
def test_the_model_is_plain_again_also_after_errors(where):
    model = deep_network()
    before, keys = attributes(model), list(model.state_dict())
    inputs, targets = random_rows(RAGGED)

    def fail(*_):
        raise MemoryError

    def run():
        with per_row_gradients(model) as wrapped:
            assert list(model.state_dict()) == keys
            assert all("forward" in vars(layer) for layer in model if list(layer.parameters()))
            handle = None
            if where == "forward":
                handle = model[2].register_forward_hook(fail)
            outputs = wrapped(inputs[:4] if where != "inside" else inputs)
            if where == "inside":
                raise MemoryError
            if where == "backward":
                outputs.register_hook(fail)
            del handle
            TASK.losses(outputs, targets[:4]).sum().backward()

    if where == "never":
        run()
    else:
        with pytest.raises(MemoryError):
            run()
    model[2]._forward_hooks.clear()
    is_plain(model, before)
    assert list(model.state_dict()) == keys


def test_per_row_gradients_can_be_taken_again_and_again():
    model = deep_network()
    inputs, targets = random_rows(RAGGED)
    first = clipped_sum(model, inputs, targets, RAGGED)
    assert torch.equal(clipped_sum(model, inputs, targets, RAGGED), first)
    with pytest.raises(MemoryError), per_row_gradients(model):
        raise MemoryError
    assert torch.equal(clipped_sum(model, inputs, targets, RAGGED), first)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, inputs):
        return self.last(self.shared(torch.tanh(self.shared(inputs.flatten(1)))))


def test_a_layer_that_is_used_twice_is_refused_without_the_guard_too():
    inputs, targets = random_rows([0, 1])
    model = Twice()
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan())

        def step():
            TASK.losses(wrapped(inputs), targets).sum().backward()
            optimizer.accumulate(torch.tensor([0, 1]), 2)

        with pytest.raises(GuardError):
            step()


def test_layers_without_row_gradients_are_refused():
    with (
        pytest.raises(TypeError, match="InstanceNorm2d"),
        per_row_gradients(nn.InstanceNorm2d(3, affine=True)),
    ):
        pass
