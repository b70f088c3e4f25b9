import math

import numpy as np
import pytest
import torch
from torch import nn

from client.training.plain import (
    TrainingStopped,
    decay_weights,
    make_optimizer,
    train,
)
from common.config import TrainingConfig
from common.errors import RefusalCode
from common.models.registry import read_parameters
from common.parameters import parameters_sha256
from common.preprocessing import Preprocessing
from common.privacy.randomness import ReproducibleRandomness
from common.schedule import learning_rate
from tests.client.training.dp_oracle import TASK, examples_of, small_network

RANDOMNESS = ReproducibleRandomness(4, "here")


def run(model, examples, training, **changes):
    arguments = dict(
        model=model,
        task=TASK,
        examples=examples,
        preprocessing=Preprocessing(image_size=8, channels=1),
        training=training,
        local_steps=5,
        round_number=1,
        num_rounds=4,
        randomness=RANDOMNESS,
        device=torch.device("cpu"),
    )
    return train(**arguments | changes)


@pytest.mark.parametrize("physical_batch_size", [1, 3, 100])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_it_is_plain_minibatch_training(physical_batch_size, optimizer):
    examples = examples_of([1, 3, 2, 4, 1])
    training = TrainingConfig(
        optimizer=optimizer,
        learning_rate=0.05,
        momentum=0.9,
        batch_size=4,
        physical_batch_size=physical_batch_size,
    )
    found = run(small_network(), examples, training)
    # The same by hand: batches 4, 4, 3, 4, 4 of two shuffled epochs, torch's own mean loss.
    model = small_network()
    own = (
        torch.optim.Adam(model.parameters(), lr=0.05)
        if optimizer == "adam"
        else torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    )
    orders = [
        RANDOMNESS.stream(purpose="shuffle", round_number=1, step=epoch).permutation(11) for epoch in (0, 1)
    ]
    images = torch.from_numpy((examples.inputs["image"] / 255 - 0.5) / 0.25).float()
    targets = torch.from_numpy(examples.targets)
    batches = [orders[0][:4], orders[0][4:8], orders[0][8:], orders[1][:4], orders[1][4:8]]
    for batch in batches:
        own.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), targets[batch]).backward()
        own.step()
    for name, expected in read_parameters(model).items():
        assert np.allclose(found.parameters[name], expected, rtol=1e-4, atol=1e-5)
    assert found.steps == 5
    assert 0 < found.started_at <= found.ended_at


def test_schedules():
    constant = TrainingConfig(learning_rate=0.4)
    assert {learning_rate(constant, round_number=r, num_rounds=9) for r in range(1, 10)} == {0.4}
    cosine = TrainingConfig(learning_rate=0.4, learning_rate_schedule="cosine")
    rates = [learning_rate(cosine, round_number=r, num_rounds=10) for r in range(1, 11)]
    assert rates[0] == 0.4
    assert rates[5] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.2 * (1 + math.cos(0.9 * math.pi)))
    for impossible in (0, 11):
        with pytest.raises(ValueError, match="round_number"):
            learning_rate(cosine, round_number=impossible, num_rounds=10)


def test_the_schedule_is_used():
    training = TrainingConfig(learning_rate=0.4, learning_rate_schedule="cosine")
    start = read_parameters(small_network())
    moved = []
    for round_number in (1, 3):
        after = run(
            small_network(),
            examples_of([8]),
            training,
            local_steps=1,
            round_number=round_number,
        ).parameters
        moved.append(after["4.weight"] - start["4.weight"])
    assert np.allclose(moved[1], moved[0] / 2, atol=1e-6)


def test_weight_decay_is_decoupled_from_the_gradient():
    weights = nn.Parameter(torch.tensor([2.0, -3.0]))
    decay_weights([weights], learning_rate=0.5, weight_decay=0.1)
    assert weights.tolist() == pytest.approx([1.9, -2.85])
    start = read_parameters(small_network())["4.weight"]
    for optimizer in ("sgd", "adam"):
        plain = TrainingConfig(optimizer=optimizer, learning_rate=0.1)
        decayed = plain.model_copy(update={"weight_decay": 0.3})
        after = [
            run(small_network(), examples_of([8]), training, local_steps=1).parameters["4.weight"]
            for training in (plain, decayed)
        ]
        assert np.allclose(after[1], after[0] - 0.1 * 0.3 * start, atol=1e-6)
        assert all(
            not group["weight_decay"]
            for group in make_optimizer([weights], decayed, learning_rate=0.1).param_groups
        )


def test_bits_depend_on_the_seed_and_not_on_torchs_generator():
    hashes = []
    for torch_seed, seed in ((1, 4), (2, 4), (1, 5)):
        torch.manual_seed(torch_seed)
        result = run(
            small_network(),
            examples_of([3] * 10),
            TrainingConfig(batch_size=4),
            randomness=ReproducibleRandomness(seed, "here"),
        )
        hashes.append(parameters_sha256(result.parameters))
    assert hashes[0] == hashes[1] != hashes[2]


def test_it_stops_between_steps():
    asked = iter([False, False, True])
    with pytest.raises(TrainingStopped, match="2 of 5") as caught:
        run(small_network(), examples_of([8]), TrainingConfig(), stop=lambda: next(asked))
    assert caught.value.refusal is RefusalCode.LATE


def test_it_learns():
    rng = np.random.default_rng(0)
    examples = examples_of([1] * 64)
    examples.targets[:] = rng.integers(0, 2, 64)
    examples.inputs["image"][:, 0, :4] //= 2
    examples.inputs["image"][examples.targets == 1, 0, :4] += 100
    model = small_network()
    run(
        model,
        examples,
        TrainingConfig(learning_rate=0.3, batch_size=16),
        local_steps=80,
    )
    images = torch.from_numpy(Preprocessing(image_size=8, channels=1).standardise(examples.inputs["image"]))
    with torch.no_grad():
        predicted = model(images).argmax(dim=1).numpy()
    assert (predicted == examples.targets).mean() > 0.95
