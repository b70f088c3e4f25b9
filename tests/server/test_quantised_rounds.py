"""Rounds with updates in whole numbers: the average, who is missing, what a question asked again says."""

import json

import numpy as np
import pytest
from flwr.app import MetricRecord

from common import messages
from common.messages import Envelope
from common.parameters import parameters_sha256, to_record, write_safetensors
from common.privacy.randomness import ReproducibleRandomness
from common.quantisation import Grid, quantised
from server.outsider import PROVEN, ROUNDED
from tests.server.fake_federation import (
    FakeGrid,
    NumpyHospital,
    arrays_in,
    assert_same_bits,
    in_round,
    make_config,
    metrics_of,
    model_of,
    outcomes,
    result_of,
    run,
    silent,
)

SHAPES = {"layer.bias": (64,), "layer.weight": (64, 100)}
RATE, NOISE = 0.5, 1.5


def initial():
    random = np.random.default_rng(0)
    return {name: 0.1 * random.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}


class GridHospital(NumpyHospital):
    """Sends noise of multiplier 1.5 and something of its own, in the encoding that is asked for."""

    def __init__(self, name, enrolled, tamper=lambda reply, request: reply) -> None:
        super().__init__(name, enrolled, tamper)
        self.grids: list[tuple[int, Grid, int]] = []

    def __call__(self, request):
        envelope = Envelope.from_record(request.content)
        if request.metadata.message_type != messages.TRAIN:
            return super().__call__(request)
        self.asked.append(envelope)
        number = envelope.key.round_number
        update = self.delta(arrays_in(request.content), number)
        if envelope.encoding != messages.ENCODING_FLOAT32:
            plan = messages.plan_from_record(request.content)
            grid, weight = messages.grid_from_record(request.content, bits=plan.wire.bits, parameters=2)
            self.grids.append((number, grid, weight))
            stream = ReproducibleRandomness(0, self.name).stream(
                purpose="rounding", round_number=number, step=0
            )
            update = quantised(update, grid=grid, weight=weight, stream=stream)
        metrics = self.metrics(request, number)
        if "steps" in metrics:
            metrics |= {"steps": 1, "noise-multiplier": NOISE, "epsilon": 5.0 * number}
        reply = messages.answer(request, envelope, arrays=to_record(update), metrics=MetricRecord(metrics))
        return self.tamper(reply, request)

    def delta(self, weights, round_number):
        random = np.random.default_rng([*self.name.encode(), round_number])
        stddev = RATE * NOISE / (0.5 * self.enrolled)
        return {
            name: (stddev * random.standard_normal(weights[name].shape) - 0.01 * weights[name]).astype(
                np.float32
            )
            for name in sorted(weights)
        }


def hospitals(**tampered):
    same = lambda reply, request: reply  # noqa: E731
    return {
        node: GridHospital(name, enrolled, tampered.get(name, same))
        for node, name, enrolled in [(7, "c", 300), (8, "a", 100), (9, "b", 200)]
    }


def config_of(folder, **sections):
    if not (start := folder.parent / "initial.safetensors").exists():
        write_safetensors(start, initial())
    sections = {"privacy": {"local-steps": 1}, "training": {"learning-rate": RATE}} | sections
    return make_config(folder, **sections)


def federate(folder, members=None, **sections):
    members = members or hospitals()
    run(config_of(folder, **sections), FakeGrid(members))
    return members


def mean_by_hand(members, rounds, missing=()):
    """FedAvg of unrounded updates on the weights of a float32 run."""
    weights = initial()
    for number in range(1, rounds + 1):
        there = [h for h in members.values() if (h.name, number) not in missing]
        total = sum(h.enrolled for h in there)
        updates = [(h.enrolled / total, h.delta(weights, number)) for h in there]
        weights = {
            name: (array + sum(share * update[name] for share, update in updates)).astype(np.float32)
            for name, array in weights.items()
        }
    return weights


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", [{}, {"private": False}, {"reproducible": True}])
def test_the_model_is_that_of_float32_to_within_the_spacings(tmp_path, bits, kind):
    """Rounding errors of three rounds: a few spacings over the total weight, nothing on the average."""
    members = federate(tmp_path / "run", wire={"bits": bits}, federation=kind)
    exact, found = mean_by_hand(members, 3), model_of(tmp_path / "run")
    grids = members[7].grids
    assert [number for number, _, _ in grids] == [1, 2, 3]
    coarsest = sum(2.0 ** max(grid.exponents) for _, grid, _ in grids) * 3 / 600
    error = np.concatenate([(found[name] - exact[name]).ravel() for name in SHAPES])
    assert 0 < np.abs(error).max() < coarsest
    assert abs(error.mean()) < 5 * error.std() / np.sqrt(len(error)) + 1e-9


def test_a_hospital_that_is_missing_leaves_the_average_of_the_others(tmp_path):
    folder = tmp_path / "run"
    members = federate(folder, hospitals(b=in_round(2, silent)), server={"deadline-s": 0.4}, wire={"bits": 8})
    assert outcomes(folder, 2)["b"] == ("late", None)
    exact, found = mean_by_hand(members, 3, missing={("b", 2)}), model_of(folder)
    for name in SHAPES:
        assert np.abs(found[name] - exact[name]).max() < 0.01


def test_all_hospitals_of_a_round_get_one_grid_and_their_own_weight(tmp_path):
    members = federate(tmp_path / "run", wire={"bits": 8})
    by_name = {hospital.name: hospital.grids for hospital in members.values()}
    for number in range(3):
        assert len({by_name[name][number][1] for name in "abc"}) == 1
        assert [by_name[name][number][2] for name in "abc"] == [100, 200, 300]


def test_the_outsiders_epsilon_is_that_of_float32_unless_the_grid_is_coarser_than_the_noise(tmp_path):
    found = {}
    for bits in (32, 8, 4):
        federate(tmp_path / str(bits) / "run", wire={"bits": bits})
        entries = result_of(tmp_path / str(bits) / "run")["hospitals"]
        assert {entry["epsilon_outsider_reason"] for entry in entries} <= {PROVEN, ROUNDED}
        found[bits] = [entry["epsilon_outsider"] for entry in entries]
    assert found[8] == found[32] < found[4] <= [15.0] * 3


def test_bytes_are_those_of_the_wire(tmp_path):
    sizes = {}
    for bits in (32, 8, 4):
        federate(tmp_path / str(bits) / "run", wire={"bits": bits})
        wire = result_of(tmp_path / str(bits) / "run")["wire"]
        assert wire["bytes_up_float32"] == 9 * 4 * 6464
        sizes[bits] = wire["bytes_up"] / 9
    assert 4 * 6464 < sizes[32] < 4 * 6464 + 1500
    assert 6464 < sizes[8] < 6464 + 1500
    assert 3232 < sizes[4] < 3232 + 2500  # before round 1 the noise is guessed: some numbers do not fit


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", [{}, {"private": False}])
def test_a_run_that_was_killed_in_a_round_asks_again_on_the_same_grid_and_ends_with_the_same_bits(
    tmp_path, kind
):
    whole = federate(tmp_path / "whole" / "run", federation=kind)
    for number in (1, 2, 3):
        folder = tmp_path / f"killed-{number}" / "run"

        def kill(reply, request):
            raise Killed

        with pytest.raises(Killed):
            federate(folder, hospitals(b=in_round(number, kill)), federation=kind)
        before = [json.loads(path.read_text())["grid"] for path in folder.glob("checkpoints/*/state.json")]
        assert all(before)
        after = federate(folder, federation=kind)
        assert_same_bits(model_of(folder), model_of(tmp_path / "whole" / "run"))
        assert after[7].grids == whole[7].grids[number - 1 :]


def test_small_models_travel_as_float32(tmp_path):
    start = {"bias": np.zeros(3, np.float32), "weight": np.zeros((4, 3), np.float32)}
    write_safetensors(tmp_path / "initial.safetensors", start)
    members = federate(tmp_path / "run", wire={"bits": 8})
    assert members[7].grids == []
    assert {envelope.encoding for envelope in members[7].asked} == {"float32"}
    closings = [line for line in metrics_of(tmp_path / "run") if "closed" in line]
    assert [line["coarsest_grid_exponent"] for line in closings] == [None] * 3
    assert parameters_sha256(model_of(tmp_path / "run")) == result_of(tmp_path / "run")["model"]["sha256"]
