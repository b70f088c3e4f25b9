"""Audit A: the noise that leaves has the variance that is charged for, in every number, fresh every time.

The noise is what left times the divisor, minus what the optimiser held before; over millions of numbers a
standard deviation that is off by a quarter of a percent is seen. At the end the same for a whole hospital,
from the delta in its answer and the charge in its ledger.
"""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

import client.round
from client.patient_optimizer import PatientDPOptimizer
from client.private_training import train_privately
from common import messages
from common.config import ModelSpec, TrainingConfig
from common.models.registry import build_model, initial_parameters, load_parameters
from common.parameters import from_record, template_of
from common.preprocessing import Preprocessing
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from tests.audit.released_steps import ALPHA, correlation_p_value, variance_p_value, watched_steps
from tests.client.dp_oracle import TASK, examples_of, make_plan
from tests.client.small_hospital import ENROLLED, ask, charges, make_hospital, training_request, weights_of
from tests.client.small_hospital import make_plan as make_public_plan

pytestmark = pytest.mark.audit

SPEC = ModelSpec(name="cnn-flatten", channels=1, image_size=8, num_outputs=2)
PLAN = make_plan(sampling_rate=0.4, l2_clip_norm=0.7, noise_multiplier=1.3, steps=4, enrolled_units=40)


def train(*, hospital=0, round_number=1, plan=PLAN):
    """Steps of one round in one hospital, with secure randomness."""
    model = build_model(SPEC)
    load_parameters(model, initial_parameters(SPEC, seed=2))
    with watched_steps() as steps:
        train_privately(
            model=model,
            task=TASK,
            examples=examples_of([1, 3, 2, 1, 4, 2] * 5, seed=hospital),
            preprocessing=Preprocessing(image_size=8, channels=1),
            plan=plan,
            training=TrainingConfig(learning_rate=0.01),
            round_number=round_number,
            num_rounds=9,
            randomness=SecureRandomness(),
            device=torch.device("cpu"),
        )
    return steps


@pytest.fixture(scope="module")
def rounds():
    """{(hospital, round): steps}: 2 hospitals x 2 rounds x 4 steps, over two million numbers."""
    return {
        (hospital, number): train(hospital=hospital, round_number=number)
        for hospital, number in itertools.product((0, 1), (1, 2))
    }


def noises(rounds):
    return [step.noise for steps in rounds.values() for step in steps]


def test_the_noise_has_the_stated_variance(rounds, found):
    noise = np.concatenate(noises(rounds))
    assert len(noise) >= 2_000_000
    found("numbers", len(noise))
    found("measured over stated standard deviation", np.sqrt(np.mean(noise**2)) / PLAN.noise_stddev)
    assert PLAN.noise_stddev == 1.3 * 0.7
    assert variance_p_value(noise, stddev=1.3 * 0.7) > ALPHA
    mean = noise.mean() * np.sqrt(len(noise)) / PLAN.noise_stddev
    assert abs(mean) < stats.norm.isf(ALPHA / 2)


def test_the_noise_is_normal(rounds, found):
    noise = np.concatenate(noises(rounds)) / PLAN.noise_stddev
    p_value = stats.kstest(noise, "norm").pvalue
    found("Kolmogorov-Smirnov p", p_value)
    assert p_value > ALPHA
    kurtosis = np.mean(noise**4) - 3
    found("excess kurtosis", kurtosis)
    assert abs(kurtosis) < stats.norm.isf(ALPHA / 2) * np.sqrt(96 / len(noise))
    expected_beyond_4 = len(noise) * 2 * stats.norm.sf(4)
    assert abs(np.sum(np.abs(noise) > 4) - expected_beyond_4) < 5 * np.sqrt(expected_beyond_4)


def test_every_parameter_has_all_of_its_noise(rounds, found):
    steps = [step for steps in rounds.values() for step in steps]
    by_parameter = [
        np.concatenate(parts) for parts in zip(*(s.noise_by_parameter for s in steps), strict=True)
    ]
    p_values = [variance_p_value(noise, stddev=PLAN.noise_stddev) for noise in by_parameter]
    found("parameters", len(p_values))
    found("smallest p", min(p_values))
    assert min(p_values) > ALPHA / len(p_values)


def test_no_noise_is_used_twice(rounds, found):
    """Across steps, rounds, hospitals and parameters, at any lag: all inner products are those of chance."""
    each = noises(rounds)
    pairs = list(itertools.combinations(each, 2))
    p_values = [correlation_p_value(first, second) for first, second in pairs]
    # The same keystream from its start in each parameter would show up between parameters of one step.
    for step in itertools.chain.from_iterable(rounds.values()):
        for first, second in itertools.combinations(step.noise_by_parameter, 2):
            length = min(len(first), len(second))
            if length >= 32:
                p_values.append(correlation_p_value(first[:length], second[:length]))
    # And a keystream with a short period, between a step and itself.
    for noise, lag in itertools.product(each, (1, 2, 3, 7, 64, 1 << 12, 1 << 16)):
        p_values.append(correlation_p_value(noise[:-lag], noise[lag:]))
    found("comparisons", len(p_values))
    found("smallest p", min(p_values))
    assert min(p_values) > ALPHA / len(p_values)
    # A small pool of numbers, in whatever order, would repeat itself; float32 on the way costs a few.
    values = np.concatenate(each)
    different = len(np.unique(values)) / len(values)
    found("share of different numbers", different)
    assert different > 0.9


def test_the_noise_does_not_depend_on_the_patients(rounds, found):
    p_values = [
        correlation_p_value(step.noise, step.clipped_sum)
        for steps in rounds.values()
        for step in steps
        if step.clipped_sum.any()
    ]
    found("smallest p", min(p_values))
    assert len(p_values) > 10
    assert min(p_values) > ALPHA / len(p_values)


# --- the whole hospital: from the answer on the wire and the charge in the ledger ---


def noise_of_answers(toml, found_numbers, *, rounds=4, steps=2):
    """Noise in the released deltas, over the standard deviation that each charge claims.

    For SGD delta = -rate / (q n) * sum over steps of (clipped sum + noise).
    """
    plan = make_public_plan(
        model={"name": SPEC.name},
        training={"optimizer": "sgd", "learning-rate": 0.25},
        privacy={"local-steps": steps, "sampling-rate": 0.4, "l2-clip-norm": 0.7},
    )
    weights = weights_of(plan)
    for number in range(1, rounds + 1):
        with watched_steps() as watched:
            answer = ask(toml, training_request(plan, weights, round_number=number))
        delta = from_record(answer[messages.ARRAYS], template_of(weights))
        charge = charges(toml)[-1]
        assert charge.key.round_number == number
        assert len(watched) == charge.event.steps == steps
        assert (charge.event.sampling_rate, charge.l2_clip_norm) == (0.4, 0.7)
        flat = np.concatenate([delta[name].astype(np.float64).ravel() for name in weights])
        noise = -flat * (0.4 * ENROLLED) / 0.25 - sum(step.clipped_sum for step in watched)
        claimed = charge.event.noise_multiplier * charge.l2_clip_norm * np.sqrt(charge.event.steps)
        found_numbers.append(noise / claimed)
    return found_numbers


@pytest.mark.parametrize("policy", [{}, {"mode": "solve", "epsilon": 3.0}], ids=["fixed", "solve"])
def test_an_answer_holds_the_noise_that_the_ledger_was_charged_for(tmp_path, flower_identity, policy, found):
    parts = noise_of_answers(make_hospital(tmp_path / "north", **policy), [])
    whole = np.concatenate(parts)
    found("numbers", len(whole))
    found("noise multiplier", charges(tmp_path / "north" / "hospital.toml")[-1].event.noise_multiplier)
    found("measured over charged standard deviation", np.sqrt(np.mean(whole**2)))
    assert len(whole) > 500_000
    assert variance_p_value(whole, stddev=1.0) > ALPHA
    for first, second in itertools.combinations(parts, 2):
        assert correlation_p_value(first, second) > ALPHA


def test_two_hospitals_answer_with_unrelated_noise(tmp_path, flower_identity, found):
    first, second = (
        noise_of_answers(make_hospital(tmp_path / name, name=name), [], rounds=1)[0]
        for name in ("north", "south")
    )
    p_value = correlation_p_value(first, second)
    found("p", p_value)
    assert p_value > ALPHA


# --- an audit that can fail ---


def test_the_audit_sees_one_percent_too_little_noise(monkeypatch):
    stated = PLAN.noise_stddev
    real = PrivacyPlan.noise_stddev.fget
    monkeypatch.setattr(PrivacyPlan, "noise_stddev", property(lambda plan: 0.99 * real(plan)))
    noise = np.concatenate([step.noise for step in train()])
    assert variance_p_value(noise, stddev=stated) < ALPHA


def test_the_audit_sees_an_answer_with_less_noise_than_charged(tmp_path, flower_identity, monkeypatch):
    real = client.round.train_privately

    def cheating(*, plan, **others):
        less = PrivacyPlan(**plan.to_dict() | {"noise_multiplier": 0.9 * plan.noise_multiplier})
        return real(plan=less, **others)

    monkeypatch.setattr(client.round, "train_privately", cheating)
    whole = np.concatenate(noise_of_answers(make_hospital(tmp_path / "north"), [], rounds=1))
    assert variance_p_value(whole, stddev=1.0) < ALPHA


def test_the_audit_sees_a_forgotten_parameter(monkeypatch):
    real = PatientDPOptimizer.add_noise

    def forgetting(optimizer):
        bias = optimizer.params[1]
        held = torch.zeros(bias.shape) if bias.summed_grad is None else bias.summed_grad.clone()
        real(optimizer)
        bias.grad = (held / optimizer.expected_batch_size).float()

    monkeypatch.setattr(PatientDPOptimizer, "add_noise", forgetting)
    parts = [step.noise_by_parameter[1] for step in train()]
    assert variance_p_value(np.concatenate(parts), stddev=PLAN.noise_stddev) < ALPHA


def test_the_audit_sees_noise_that_comes_again(monkeypatch):
    same = ReproducibleRandomness(5, "everywhere")
    real = SecureRandomness.stream

    def stream(source, *, purpose, round_number, step):
        if purpose == "noise":
            return same.stream(purpose=purpose, round_number=0, step=0)
        return real(source, purpose=purpose, round_number=round_number, step=step)

    monkeypatch.setattr(SecureRandomness, "stream", stream)
    first, second, *_ = train()
    assert correlation_p_value(first.noise, second.noise) < ALPHA
