"""The second epsilon: its noise against the noise of real averages, its events against hand-made ones."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from client.training.private import train_privately
from common.config import TrainingConfig
from common.parameters import difference
from common.preprocessing import Preprocessing
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from server.aggregation import aggregate
from server.outsider import (
    ALONE,
    INCOMPLETE_RECORD,
    NOT_SGD,
    PROVEN,
    ROUNDED,
    SEVERAL_STEPS,
    Contribution,
    effective_noise_multipliers,
    outsider_costs,
    outsider_events,
)
from server.run_state import RunState
from server.totals import HospitalTotals
from tests.client.training.dp_oracle import TASK, examples_of, make_plan, small_network
from tests.server.fake_federation import (
    FakeGrid,
    HeldVector,
    NumpyHospital,
    in_round,
    make_config,
    metrics_of,
    result_of,
    run,
    silent,
    some_parameters,
)

ALPHA, RATE = 1e-6, 0.5
HOSPITALS = {  # weight in the average, count that it divides by, noise multiplier
    "a": (20, 20, 1.5),
    "b": (40, 40, 3.0),
    "c": (60, 30, 2.0),  # bound with another count than it works with
}


def contribution(name, weight, divided_by, sigma):
    return Contribution(hospital=name, weight=weight, divided_by=divided_by, noise_multiplier=sigma)


CONTRIBUTIONS = [contribution(name, *numbers) for name, numbers in HOSPITALS.items()]


def update(name, examples, randomness):
    """One real private step in a hospital, everybody in the batch, as a flat update."""
    _, divided_by, sigma = HOSPITALS[name]
    model = small_network()
    before = {key: value.detach().numpy().copy() for key, value in model.state_dict().items()}
    result = train_privately(
        model=model,
        task=TASK,
        examples=examples,
        preprocessing=Preprocessing(image_size=8, channels=1),
        plan=make_plan(sampling_rate=1.0, noise_multiplier=sigma, enrolled_units=divided_by),
        training=TrainingConfig(learning_rate=RATE, momentum=0.9, weight_decay=0.1),
        round_number=1,
        num_rounds=1,
        randomness=randomness,
        device=torch.device("cpu"),
    )
    delta = difference(result.parameters, before)
    return np.concatenate([delta[key].ravel() for key in sorted(delta)])


def mean_update(examples, randomness):
    updates = [update(name, examples[name], randomness(name)) for name in HOSPITALS]
    held = [HeldVector(update) for update in updates]
    return aggregate(held, [float(numbers[0]) for numbers in HOSPITALS.values()])


def sensitivity(name):
    """What one patient of a hospital can move the mean by: clip 1, sampling rate 1."""
    weight, divided_by, _ = HOSPITALS[name]
    return RATE * weight / sum(numbers[0] for numbers in HOSPITALS.values()) / divided_by


def test_the_noise_of_real_averages_is_the_effective_one_over_the_sensitivity():
    examples = {name: examples_of(np.full(12, 2), seed=number) for number, name in enumerate(HOSPITALS)}
    means = np.stack([mean_update(examples, lambda _: SecureRandomness()) for _ in range(60)]).astype(float)
    squares, freedom = means.var(axis=0, ddof=1).sum() * 59, 59 * means.shape[1]
    for name, sigma in effective_noise_multipliers(CONTRIBUTIONS).items():
        scaled = squares / (sigma * sensitivity(name)) ** 2
        low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], freedom)
        assert low < scaled < high, (name, math.sqrt(scaled / freedom))
        assert not low < scaled * 1.1 < high  # the test sees noise that is 5 % off


@pytest.mark.parametrize("name", HOSPITALS)
def test_one_patient_moves_the_average_by_no_more_than_the_sensitivity(name):
    everybody = {other: examples_of(np.full(12, 2), seed=n) for n, other in enumerate(HOSPITALS)}
    without = {**everybody, name: first_units(everybody[name], 11)}
    randomness = lambda hospital: ReproducibleRandomness(5, hospital)  # noqa: E731
    moved = np.linalg.norm(mean_update(everybody, randomness) - mean_update(without, randomness))
    assert 0.3 * sensitivity(name) < moved <= sensitivity(name) * (1 + 1e-4)


def first_units(examples, number):
    kept = examples.units < number
    return type(examples)(
        inputs={key: values[kept] for key, values in examples.inputs.items()},
        targets=examples.targets[kept],
        units=examples.units[kept],
        unit_ids=examples.unit_ids[:number],
    )


def test_two_hospitals_with_noise_3_and_4_have_5_together():
    both = effective_noise_multipliers([contribution("a", 10, 10, 3.0), contribution("b", 700, 700, 4.0)])
    assert both == {"a": pytest.approx(5, rel=1e-5), "b": pytest.approx(5, rel=1e-5)}
    assert max(both.values()) <= 5


def test_alone_a_hospital_has_its_own_noise_exactly():
    random = np.random.default_rng(1)
    for _ in range(200):
        weight, divided_by = random.integers(1, 10_000, 2)
        sigma = float(random.uniform(0.3, 50))
        assert effective_noise_multipliers([contribution("a", weight, divided_by, sigma)]) == {"a": sigma}


def test_effective_noise_is_never_above_the_formula_and_never_below_the_own():
    random = np.random.default_rng(2)
    for _ in range(200):
        mine = [
            contribution(str(n), *random.integers(1, 1000, 2), float(random.uniform(0.3, 50)))
            for n in range(5)
        ]
        for c in mine:
            c_k = c.weight / c.divided_by
            exact = math.sqrt(sum((o.weight / o.divided_by * o.noise_multiplier) ** 2 for o in mine)) / c_k
            found = effective_noise_multipliers(mine)[c.hospital]
            assert c.noise_multiplier <= found <= exact * (1 + 1e-12)
            assert found > exact * (1 - 1e-4)


def test_many_kinds_of_noise_become_few_and_never_more_noise():
    rounds = [[contribution("a", 1, 1, 2.0 + n / 100), contribution("b", 1, 1, 5.0)] for n in range(60)]
    events = outsider_events(rounds, sampling_rate=0.5)["a"]
    exact = sorted(effective_noise_multipliers(contributions)["a"] for contributions in rounds)
    found = sorted(event.noise_multiplier for event in events)
    assert (len(found), sum(event.steps for event in events)) == (60, 60)
    assert len(set(found)) <= 4
    assert all(few <= many for few, many in zip(found, exact, strict=True))
    assert found[0] == exact[0]


def one_step(reply, request):
    """Hospitals of this file take one step."""
    if "metrics" in reply.content:
        reply.content["metrics"]["steps"] = 1
    return reply


def federation(folder, *, hospitals=("a", "b", "c"), tamper=None, **sections):
    sections.setdefault("privacy", {"local-steps": 1})
    sections.setdefault("training", {"optimizer": "sgd"})
    if len(hospitals) == 1:
        sections["server"] = {"quorum": 1}
        sections["runtime"] = {"expected-hospitals": 1}
    grid = FakeGrid(
        {
            number: NumpyHospital(
                name,
                100 * (number + 1),
                lambda reply, request, name=name: (tamper or {}).get(name, lambda r, _: r)(
                    one_step(reply, request), request
                ),
            )
            for number, name in enumerate(hospitals)
        }
    )
    run(make_config(folder, **sections), grid)
    return {h["name"]: h for h in result_of(folder)["hospitals"]}


def cost_of(*sigmas, q=0.5):
    events = [PrivacyEvent(sampling_rate=q, noise_multiplier=sigma, steps=1) for sigma in sigmas]
    return epsilon(events, delta=1e-3)


@pytest.mark.parametrize("optimizer", ["plain", "momentum", "adam"])
def test_a_run_states_the_accountants_number_for_hand_made_events(tmp_path, optimizer):
    late = {"c": in_round(2, silent)}
    server = {"optimizer": optimizer, "ema-decay": 0.5, "final-model": "ema", "deadline-s": 0.3}
    found = federation(tmp_path / "run", tamper=late, server=server)
    all_three, two = 4 * math.sqrt(3), 4 * math.sqrt(2)
    expected = {"a": cost_of(all_three, two, all_three), "c": cost_of(all_three, all_three)}
    expected["b"] = expected["a"]
    for name, entry in found.items():
        assert entry["epsilon_outsider"] == pytest.approx(expected[name], rel=6e-3)
        assert entry["epsilon_outsider"] >= expected[name] * (1 - 1e-9)
        assert entry["epsilon_outsider"] < entry["epsilon"]
        assert (entry["epsilon_outsider_proven"], entry["epsilon_outsider_reason"]) == (True, PROVEN)


@pytest.mark.parametrize(
    ("sections", "hospitals", "reason"),
    [
        ({"privacy": {"local-steps": 2}}, ("a", "b", "c"), SEVERAL_STEPS),
        ({"training": {"optimizer": "adam"}}, ("a", "b", "c"), NOT_SGD),
        ({}, ("a",), ALONE),
    ],
)
def test_where_nothing_smaller_is_proven_the_number_is_the_same_and_the_reason_is_said(
    tmp_path, sections, hospitals, reason
):
    for entry in federation(tmp_path / "run", hospitals=hospitals, **sections).values():
        assert entry["epsilon_outsider"] == entry["epsilon"] > 0
        assert (entry["epsilon_outsider_proven"], entry["epsilon_outsider_reason"]) == (False, reason)


@pytest.mark.parametrize("claims", [{"private": False}, {"reproducible": True}])
def test_without_a_claim_there_is_no_second_epsilon(tmp_path, claims):
    for entry in federation(tmp_path / "run", federation=claims).values():
        assert entry["epsilon_outsider"] is entry["epsilon_outsider_reason"] is None


@pytest.fixture
def recorded(tmp_path):
    """Configuration, lines and state of a run of three rounds."""
    folder = tmp_path / "run"
    federation(folder)
    config = make_config(folder, privacy={"local-steps": 1})
    totals = {
        name: HospitalTotals(enrolled_patients=100, rounds=3, epsilon=3.0, delta=1e-3, noise_multiplier=4.0)
        for name in "abc"
    }
    state = RunState(run_id="r", round_number=3, weights=some_parameters(0), plan={}, hospitals=totals)
    return config, metrics_of(folder), state


def without_first_round(lines):
    return [line for line in lines if line["round"] != 1]


def without_one_line(lines):
    return [line for line in lines if (line["round"], line.get("hospital")) != (2, "b")]


def changed(key, value):
    return lambda lines: [
        line | {key: value} if (line["round"], line.get("hospital")) == (2, "b") else line for line in lines
    ]


@pytest.mark.parametrize(
    "damage",
    [
        without_first_round,
        without_one_line,
        lambda lines: [],
        lambda lines: [line for line in lines if line.get("aggregated") is None],
        changed("noise_multiplier", None),
        changed("noise_multiplier", 0.0),
        changed("noise_multiplier", math.nan),
        changed("enrolled_patients", "many"),
        changed("steps", 2),
        changed("steps", 0),
        changed("hospital", "a"),
        changed("hospital", "somebody"),
    ],
)
def test_a_record_that_is_not_whole_proves_nothing(recorded, damage):
    config, lines, state = recorded
    assert all(cost.is_proven for cost in outsider_costs(config, state, lines).values())
    for cost in outsider_costs(config, state, damage(lines)).values():
        assert (cost.is_proven, cost.reason, cost.epsilon) == (False, INCOMPLETE_RECORD, 3.0)


def with_grid(lines, exponent):
    return [line | {"coarsest_grid_exponent": exponent} if "closed" in line else line for line in lines]


def test_a_record_that_does_not_say_how_updates_were_rounded_proves_nothing(recorded):
    config, lines, state = recorded
    for exponent in ("missing", 0.5, "-3"):
        for cost in outsider_costs(config, state, with_grid(lines, exponent)).values():
            assert (cost.is_proven, cost.reason) == (False, INCOMPLETE_RECORD)


def test_a_grid_finer_than_the_noise_changes_nothing_and_a_coarser_one_ends_the_proof(recorded):
    """Noise of 4 at rate 0.5, C 1 and q 0.5 is 4 in the weighted update: a spacing up to 1.6 will do."""
    config, lines, state = recorded
    assert outsider_costs(config, state, with_grid(lines, 0)) == outsider_costs(config, state, lines)
    for cost in outsider_costs(config, state, with_grid(lines, 1)).values():
        assert (cost.is_proven, cost.reason, cost.epsilon) == (False, ROUNDED, 3.0)


def test_a_hospital_with_little_noise_neither_helps_nor_is_helped():
    mine = [contribution("a", 1, 1, 3.0), contribution("b", 1, 1, 4.0)]
    coarse = replace(contribution("c", 1, 1, 2.0), adds_up=False)
    found = effective_noise_multipliers([*mine, coarse])
    assert found == effective_noise_multipliers(mine) | {"c": 2.0}


def law_of_rounded(mean, stddev, points):
    """Probability of each whole number, rounded stochastically: the normal density against a triangle."""
    fine = np.arange(-0.995, 1, 0.01)
    triangle = (1 - np.abs(fine)) * 0.01
    densities = stats.norm.pdf(points[:, None] + fine[None, :], mean, stddev)
    return densities @ triangle


@pytest.mark.parametrize(("stddev", "alias"), [(0.5, 0.29), (0.75, 4e-3), (1.0, 6e-5), (1.5, 3e-10)])
def test_sums_of_rounded_noise_are_rounded_sums_of_noise_up_to_the_alias(stddev, alias):
    """Two hospitals with this noise in spacings, against their Gaussian sum rounded once (module text)."""
    points = np.arange(-40, 41)
    assert alias == pytest.approx(math.exp(-(math.pi**2) * stddev**2), rel=0.5) or stddev == 0.5
    triangles = np.convolve(*[(1 - np.abs(np.arange(-0.995, 1, 0.01))) * 0.01] * 2)
    for mean in (0.0, 0.25, 0.5):
        each = law_of_rounded(mean, stddev, points), law_of_rounded(0.3, stddev, points)
        together = np.convolve(*each)[40:121]
        offsets = (np.arange(len(triangles)) - (len(triangles) - 1) / 2) * 0.01
        ideal = stats.norm.pdf(points[:, None] + offsets, mean + 0.3, stddev * math.sqrt(2)) @ triangles
        assert np.abs(together - ideal).max() < alias + 1e-12


def test_rounds_that_are_not_in_the_model_do_not_count(recorded):
    config, lines, state = recorded
    whole = outsider_costs(config, state, lines)
    given_up = [line | {"round": 4} for line in lines if line["round"] == 3 and "hospital" in line]
    assert outsider_costs(config, state, [*lines, *given_up]) == whole
    trained_again = [line | {"round": 4} for line in lines if line["round"] == 3]
    assert outsider_costs(config, state, [*lines, *trained_again]) == whole


def test_it_is_never_above_a_complete_first_epsilon(recorded):
    config, lines, state = recorded
    small = {name: replace(totals, epsilon=0.01) for name, totals in state.hospitals.items()}
    assert {
        cost.epsilon for cost in outsider_costs(config, replace(state, hospitals=small), lines).values()
    } == {0.01}
