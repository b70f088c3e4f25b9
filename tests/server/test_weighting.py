"""Weights of updates: counts or their squares, in the mean and in what an outsider's epsilon follows from."""

import math

import numpy as np
import pytest

from common.config import FederationConfig, ServerSection, WireSection
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from server.weighting import weight_of
from tests.server.fake_federation import (
    FakeGrid,
    assert_same_bits,
    fedavg_by_hand,
    make_config,
    model_of,
    result_of,
    run,
    three_hospitals,
)
from tests.server.test_outsider import one_step

SQUARES = ServerSection(weighting="squares")


def noise_of_mean(weights, counts):
    """Standard deviation of the noise in the mean, in units of sigma C / q."""
    return math.hypot(*(w / n for w, n in zip(weights, counts, strict=True))) / sum(weights)


def test_the_numbers_of_the_docstring():
    counts = [1800, 40]
    by_server = {
        server.weighting: noise_of_mean([weight_of(server, enrolled_patients=n) for n in counts], counts)
        for server in (ServerSection(), SQUARES)
    }
    assert by_server["patients"] * 1800 == pytest.approx(1.383, abs=1e-3)
    assert by_server["squares"] * 1800 == pytest.approx(0.9998, abs=1e-4)


def test_no_weights_leave_less_noise_than_squares():
    counts = [20, 1800, 430, 790, 1700, 40]
    least = noise_of_mean([weight_of(SQUARES, enrolled_patients=n) for n in counts], counts)
    rng = np.random.default_rng(0)
    assert all(noise_of_mean(rng.exponential(size=6) ** 2 + 1e-9, counts) >= least for _ in range(300))
    assert noise_of_mean(counts, counts) > 1.3 * least


def test_squares_on_a_grid_are_refused():
    with pytest.raises(ValueError, match=r"wire\.bits"):
        FederationConfig(server=SQUARES)
    FederationConfig(server=SQUARES, wire=WireSection(bits=32))


def test_a_run_averages_by_squares_and_states_the_outsiders_epsilon_of_it(tmp_path):
    folder, hospitals = tmp_path / "run", three_hospitals()
    for hospital in hospitals.values():
        hospital.tamper = one_step
    config = make_config(
        folder,
        server={"weighting": "squares"},
        wire={"bits": 32},
        privacy={"local-steps": 1},
        training={"optimizer": "sgd"},
    )
    run(config, FakeGrid(hospitals))
    by_hand = fedavg_by_hand(hospitals.values(), 3, weight=lambda enrolled: enrolled**2)
    assert_same_bits(model_of(folder), by_hand)
    for entry in result_of(folder)["hospitals"]:
        # noise multipliers of 4; the mean holds noise of 4 * hypot(100, 200, 300) per 1 of each count
        together = 4 * math.hypot(100, 200, 300) / entry["enrolled_patients"]
        event = PrivacyEvent(sampling_rate=0.5, noise_multiplier=together, steps=1)
        expected = epsilon([event] * 3, delta=1e-3)
        assert entry["epsilon_outsider_proven"]
        assert expected * (1 - 1e-9) <= entry["epsilon_outsider"] <= expected * 1.01
    assert "the squares of enrolled" in (folder / "MODEL_CARD.md").read_text()
