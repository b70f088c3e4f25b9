"""Noise of large parameters is drawn in pieces: independent, and the same bits for any number of threads."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from client.training.patient_optimizer import _PIECE
from client.training.private import per_row_gradients
from common.errors import GuardError
from common.privacy.noise import most_sampled
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from tests.client.training.dp_oracle import (
    accumulate_all,
    make_dp_optimizer,
    make_plan,
    noise_of_step,
    random_rows,
    relative_error,
)


def large_network():
    """Two and a half pieces, two small parameters, and one of exactly a piece."""
    return nn.Sequential(
        nn.Linear(5, _PIECE // 2, bias=False), nn.Linear(4, 3), nn.Linear(_PIECE // 4, 4, bias=False)
    )


def released(source, *, threads=1, steps=1):
    """What steps of nobody release, (steps, numbers), in standard deviations."""
    model, plan = large_network(), make_plan(steps=steps)
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        optimizer = make_dp_optimizer(model, plan, randomness=source)
        for _ in range(steps):
            optimizer.step()
            found.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    finally:
        torch.set_num_threads(before)
    return torch.stack(found).numpy() * plan.expected_batch_size / plan.noise_stddev


def pieces(noise):
    sizes = [p.numel() for p in large_network().parameters()]
    parameters = np.split(noise, np.cumsum(sizes)[:-1])
    return [part[start : start + _PIECE] for part in parameters for start in range(0, len(part), _PIECE)]


def test_the_bits_are_the_same_for_any_number_of_threads():
    found = [released(ReproducibleRandomness(3, "here"), threads=threads) for threads in (1, 2, 3)]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    model, plan = large_network(), make_plan()
    expected = noise_of_step(model, plan, ReproducibleRandomness(3, "here")) / plan.noise_stddev
    assert relative_error(torch.from_numpy(found[0][0]), expected) < 1e-6


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("source", [SecureRandomness, lambda: ReproducibleRandomness(3, "here")])
def test_pieces_have_nothing_in_common_and_all_of_the_noise(source, threads):
    noise = released(source(), threads=threads, steps=2)
    parts = [part for step in noise for part in pieces(step)]
    assert len(parts) == 12
    for part in parts:
        assert abs(float(part @ part) / len(part) - 1) < 5.5 * math.sqrt(2 / len(part))
    for first, second in itertools.combinations(parts, 2):
        length = min(len(first), len(second))
        assert length < 10 or abs(float(first[:length] @ second[:length])) < 5.5 * math.sqrt(length)
        # Nor does one hold a stretch of the other; a few numbers are equal by chance, as float32.
        assert length < 10 or np.isin(first[:100], second).sum() < 20
    assert all((step != 0).all() for step in noise)


def test_each_piece_asks_for_a_stream_of_its_own():
    asked = []

    class Asking(ReproducibleRandomness):
        def stream(self, **where):
            asked.append(tuple(sorted(where.items())))
            return super().stream(**where)

    released(Asking(1, "here"), steps=2)
    assert len(asked) == len(set(asked)) == 12


def test_more_units_than_rounding_is_paid_for_are_refused():
    plan = make_plan()
    most = most_sampled(plan)
    assert most == 4 * 10 + 1000
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan(steps=2))
        units = np.arange(most)
        accumulate_all(wrapped, optimizer, *random_rows(units), units, max_rows=500)
        optimizer.step()  # as many as are paid for, and the next step counts anew
        accumulate_all(wrapped, optimizer, *random_rows(units), units, max_rows=500)
        with pytest.raises(GuardError, match="1041 units"):
            accumulate_all(wrapped, optimizer, *random_rows([0]), [0], max_rows=500)
        # The round ends there: what the refused unit was to add is in no release.
        optimizer.zero_grad()
        accumulate_all(wrapped, optimizer, *random_rows([0]), [0], max_rows=500)
