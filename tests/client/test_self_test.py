"""The start-up self-test: green on what is installed, red for a planted bug of each kind, closed on a crash.

Deep models are slow: every check goes through their millions of parameters several times.
"""

import gc
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from client.self_test import checks as self_test_checks
from client.self_test import round_checks as self_test_rounds
from client.self_test import setup as self_test_setup
from client.self_test import start as self_test
from client.self_test.checks import not_poisson
from client.self_test.setup import Setup
from client.self_test.start import CHECKS, Check, require_self_test, run_check, run_checks
from client.training import patient_optimizer
from client.training import private as private_training
from client.training.patient_optimizer import PatientDPOptimizer
from common.errors import Refusal, RefusalCode
from common.models.names import MODELS
from common.privacy.plan import PrivacyEvent, PrivacyPlan
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from common.tasks import Classification
from tests.audit.mutants import all_mutants
from tests.client.small_hospital import make_plan
from tests.client.training.dp_oracle import examples_of
from tests.model_names import OF_SERIES, STEPS, each_model

CLIPPING, COUPLING, PLACES, NOISE, SAMPLING, RELEASE = CHECKS


def make_setup(
    model="softmax",
    size=8,
    *,
    rows=(1, 3, 2, 1, 6) * 12,
    channels=1,
    training=None,
    augmentation=None,
    **numbers,
):
    examples = examples_of(list(rows), size=size)
    if channels == 3:
        images = np.repeat(examples.inputs["image"], 3, axis=1)
        examples = replace(examples, inputs={"image": images})
    data = {"image-size": size, "channels": channels}
    if model in OF_SERIES:
        examples = as_series(examples, STEPS)
        data |= {"series": "visits", "steps": STEPS}
    plan = make_plan(
        data=data, model={"name": model}, training=training or {}, augmentation=augmentation or {}
    )
    values = dict(
        sampling_rate=0.4,
        l2_clip_norm=0.7,
        noise_multiplier=1.3,
        steps=3,
        enrolled_units=50,
        max_rows_per_unit=4,
        unit="patient",
    )
    privacy = PrivacyPlan(**values | numbers)
    return Setup(plan=plan, privacy=privacy, examples=examples, device=torch.device("cpu"))


def as_series(examples, steps):
    """Each image as the last of a series of others."""
    numbers = (np.arange(examples.num_rows)[:, None] + np.arange(steps)) % examples.num_rows
    lengths = 1 + np.arange(examples.num_rows) % steps
    present = (np.arange(steps) < lengths[:, None]).astype(np.float32)
    inputs = {"image": examples.inputs["image"][numbers], "present": present, "years": 0.5 * present}
    return replace(examples, inputs=inputs)


def red(setup, *names):
    """The names of the checks that are red, of these or of all."""
    return {check.name for name in names or CHECKS if not (check := run_check(name, setup)).passed}


@pytest.mark.parametrize("model", each_model(deep=()))
def test_every_model_is_green(model):
    size = max(MODELS[model].minimum_image_size, 8)
    assert [check for check in run_checks(make_setup(model, size)) if not check.passed] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"optimizer": "adam", "learning-rate": 0.01, "weight-decay": 0.1}},
        {"training": {"momentum": 0.9, "learning-rate-schedule": "cosine", "physical-batch-size": 1}},
        {"sampling_rate": 1.0},
        {"sampling_rate": 0.004},
        {"rows": ()},
        {"rows": (9,), "max_rows_per_unit": 1},
        {"l2_clip_norm": 100.0, "noise_multiplier": 300.0, "channels": 3},
        {"l2_clip_norm": 1e-3, "noise_multiplier": 0.3},
        {"augmentation": {"flip": "both", "rotate": 10, "elastic": 0.02, "noise": 0.1}},
        {"clipping": "automatic"},
        {"training": {"augmentations": 3}, "augmentation": {"shift": 0.1}},
    ],
    ids=[
        *("adam", "momentum", "full batch", "small rate", "nobody", "one patient", "large", "small"),
        *("changed", "automatic", "copies"),
    ],
)
def test_every_setting_is_green(changes):
    assert [check for check in run_checks(make_setup(**changes)) if not check.passed] == []


# --- planted bugs ---


def test_augmentation_that_mixes_rows_or_changes_nobodys_is_red(monkeypatch):
    real = private_training.augment_of_step

    def mixing(*arguments, **named):
        augment = real(*arguments, **named)
        return augment and (lambda inputs, *who: 0.9 * augment(inputs, *who) + 0.1 * inputs.roll(1, 0))

    def by_place(*arguments, **named):
        augment = real(*arguments, **named)
        return augment and (lambda inputs, rows, views: augment(inputs, np.arange(len(rows)), views))

    setup = make_setup(augmentation={"shift": 0.1})
    assert red(setup, PLACES) == set()
    for planted in (mixing, by_place):
        monkeypatch.setattr(private_training, "augment_of_step", planted)
        assert red(setup, PLACES) == {PLACES}
        assert red(make_setup(), PLACES) == set(), "off is off"


def test_a_clip_that_does_not_hold_is_red(monkeypatch):
    real = patient_optimizer.clip_factors
    monkeypatch.setattr(
        patient_optimizer,
        "clip_factors",
        lambda norms, *, l2_clip_norm: 1.01 * real(norms, l2_clip_norm=l2_clip_norm),
    )
    assert CLIPPING in red(make_setup(), CLIPPING, COUPLING)


def test_clipping_images_instead_of_patients_is_red(monkeypatch):
    def by_row(wrapped, task, optimizer, *, inputs, targets, segments, num_units):
        task.losses(wrapped(inputs), targets).sum().backward()
        optimizer.accumulate(torch.arange(len(inputs)), len(inputs))

    monkeypatch.setattr(private_training, "accumulate_clipped_gradients", by_row)
    assert CLIPPING in red(make_setup(rows=[6] * 9), CLIPPING)


def test_a_broken_image_that_reaches_the_sum_is_red(monkeypatch):
    factors = lambda norms, *, l2_clip_norm: (l2_clip_norm / norms).clamp(max=1)  # noqa: E731
    monkeypatch.setattr(patient_optimizer, "clip_factors", factors)
    assert CLIPPING in red(make_setup(), CLIPPING)


def test_a_loss_that_couples_patients_is_red(monkeypatch):
    def weighted_mean(task, outputs, targets):
        weight = torch.tensor([1.0, 9.0])
        losses = nn.functional.cross_entropy(outputs, targets, weight=weight, reduction="none")
        return losses / weight[targets].sum()

    monkeypatch.setattr(Classification, "losses", weighted_mean)
    assert {COUPLING, RELEASE} <= red(make_setup(), COUPLING, RELEASE)


class _Centred(nn.Module):
    """Subtracts the batch's mean, as BatchNorm does."""

    def forward(self, x):
        return x - x.mean(dim=0)


def test_a_layer_that_couples_patients_is_red(monkeypatch):
    real = self_test_setup.build_model

    def build(spec):
        return nn.Sequential(nn.Flatten(), _Centred(), real(spec).output)

    for module in (self_test_setup, self_test_rounds):
        monkeypatch.setattr(module, "load_parameters", lambda model, weights: None)
    monkeypatch.setattr(self_test_setup, "build_model", build)
    monkeypatch.setattr(private_training, "place_matters", lambda *_, **__: False)  # it keeps patients apart
    assert {COUPLING, RELEASE} <= red(make_setup(), COUPLING, RELEASE)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_sigma_off_by_five_percent_is_red(monkeypatch, factor):
    real = PrivacyPlan.noise_stddev.fget
    monkeypatch.setattr(PrivacyPlan, "noise_stddev", property(lambda plan: factor * real(plan)))
    assert red(make_setup(), NOISE) == {NOISE}


def test_a_parameter_without_noise_is_red(monkeypatch):
    real = PatientDPOptimizer.add_noise

    def forgetting(optimizer):
        real(optimizer)
        optimizer.params[-1].grad.zero_()

    monkeypatch.setattr(PatientDPOptimizer, "add_noise", forgetting)
    assert NOISE in red(make_setup("cnn-small", 17), NOISE)


def test_noise_that_comes_again_is_red(monkeypatch):
    same = ReproducibleRandomness(3, "everywhere")
    monkeypatch.setattr(SecureRandomness, "stream", lambda _, **where: same.stream(**where))
    assert NOISE in red(make_setup(), NOISE)


def shuffled(num_units, rate, stream, order=[]):  # noqa: B006 - carried from step to step
    size = int(rate * num_units)
    if len(order) < size:
        order.extend(np.random.default_rng(1).permutation(num_units))
    batch, order[:] = order[:size], order[size:]
    return np.unique(batch).astype(np.int64)


def in_couples(num_units, rate, stream):
    halves = np.flatnonzero(stream.uniform(num_units // 2) < rate)
    return np.sort(np.concatenate([2 * halves, 2 * halves + 1]))


def favouring(num_units, rate, stream):
    units = np.flatnonzero(stream.uniform(num_units) < rate)
    return np.union1d(units, [3]) if stream.uniform(1)[0] < 0.3 else units


def sticky(num_units, rate, stream, last=[]):  # noqa: B006
    units = np.flatnonzero(stream.uniform(num_units) < rate)
    if last and stream.uniform(1)[0] < 0.2:
        units = last[-1]
    last[:] = [units]
    return units


@pytest.mark.parametrize(
    "sampler",
    [
        shuffled,
        lambda n, rate, stream: np.sort(stream.permutation(n)[: int(rate * n)]),
        lambda n, rate, stream: np.flatnonzero(stream.uniform(n) < 1.05 * rate),
        in_couples,
        favouring,
        sticky,
    ],
    ids=["shuffled", "fixed size", "other rate", "in couples", "favourite", "sticky"],
)
def test_anything_but_poisson_sampling_is_red(monkeypatch, sampler):
    monkeypatch.setattr(private_training, "poisson_sample", sampler)
    assert red(make_setup(), SAMPLING) == {SAMPLING}


def test_more_images_of_a_patient_than_planned_are_red(monkeypatch):
    real = private_training.sampled_rows
    monkeypatch.setattr(
        private_training,
        "sampled_rows",
        lambda *where, max_rows_per_unit, stream: real(*where, max_rows_per_unit=99, stream=stream),
    )
    assert red(make_setup(), SAMPLING) == {SAMPLING}


def test_fewer_steps_in_the_books_than_ran_is_red(monkeypatch):
    def one_too_few(plan):
        return PrivacyEvent(
            sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=plan.steps - 1
        )

    monkeypatch.setattr(PrivacyPlan, "event", one_too_few)
    assert red(make_setup(), RELEASE) == {RELEASE}


def test_a_clean_moment_that_leaves_is_red(monkeypatch):
    real = PatientDPOptimizer.step

    def leaking(optimizer, closure=None):
        clean = [None if p.summed_grad is None else p.summed_grad.clone() for p in optimizer.params]
        real(optimizer)
        for parameter, momentum in zip(optimizer.params, clean, strict=True):
            if momentum is not None:
                parameter.data -= 0.1 * momentum.float()

    monkeypatch.setattr(PatientDPOptimizer, "step", leaking)
    assert red(make_setup(), RELEASE) == {RELEASE}


def test_a_buffer_that_leaves_is_red(monkeypatch):
    real = private_training.read_parameters
    monkeypatch.setattr(
        private_training,
        "read_parameters",
        lambda model: real(model) | {"running_mean": np.zeros(3, np.float32)},
    )
    assert red(make_setup(), RELEASE) == {RELEASE}


def test_training_on_the_clean_sum_is_red(monkeypatch):
    def clean(optimizer):
        for parameter in optimizer.params:
            held = torch.zeros(parameter.shape) if parameter.summed_grad is None else parameter.summed_grad
            parameter.grad, parameter.summed_grad = held.float() / optimizer.expected_batch_size, None

    monkeypatch.setattr(PatientDPOptimizer, "add_noise", clean)
    assert {NOISE, RELEASE} <= red(make_setup(), NOISE, RELEASE)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("no-noise-in-the-last-step", NOISE),
        ("noise-in-floating-point", NOISE),
        ("noise-repeated-in-every-step", NOISE),
        ("noise-from-torchs-seeded-generator", NOISE),
        ("noise-from-numpys-seeded-generator", NOISE),
        ("patients-drawn-by-a-seed-that-others-know", NOISE),
        ("a-random-patient-for-an-empty-batch", SAMPLING),
        ("no-noise-in-the-last-step", RELEASE),
        ("a-batch-enters-later-releases-too", RELEASE),
        ("momentum-before-the-noise", RELEASE),
        ("half-a-batch-stays", CLIPPING),
        ("training-stops-when-patients-are-learned", RELEASE),
        ("padding-other-than-zeros", RELEASE),
        ("weight-decay-inside-the-loss", RELEASE),
        ("pieces-of-noise-share-a-stream", NOISE),
        ("norms-of-one-row-for-all-of-a-patient", RELEASE),
        ("cross-terms-of-a-patients-rows-forgotten", RELEASE),
        ("a-layer-falls-back-to-the-gradient-of-the-batch", COUPLING),
        ("rows-that-fill-a-chunk-up-are-counted", CLIPPING),
    ],
)
def test_a_bug_of_the_audit_is_red(monkeypatch, name, check):
    if check == COUPLING:
        # Whether places matter is tried once: with this bug they would, and each patient have a chunk alone.
        assert red(make_setup("cnn1", 14), check) == set()
    all_mutants()[name].put_in(monkeypatch)
    assert red(make_setup("cnn1", 14), check) == {check}


def test_more_steps_than_planned_are_red(monkeypatch):
    real = PatientDPOptimizer.step

    def twice(optimizer, closure=None):
        real(optimizer)
        optimizer.original_optimizer.step()

    monkeypatch.setattr(PatientDPOptimizer, "step", twice)
    assert red(make_setup(), RELEASE) == {RELEASE}


def test_last_bits_that_depend_on_the_company_are_red(monkeypatch):
    real = private_training.accumulate_clipped_gradients

    def shifted(*arguments, inputs, num_units, **others):
        # One part in a million, far below what `no coupling between patients` can see.
        real(*arguments, inputs=inputs * (1 + 1e-6 * num_units), num_units=num_units, **others)

    monkeypatch.setattr(private_training, "accumulate_clipped_gradients", shifted)
    assert red(make_setup(), COUPLING, PLACES) == {PLACES}


@pytest.mark.parametrize("factor", [1.0, 1e4, 1e30])
def test_weights_that_arrived_may_be_absurd(factor):
    setup = make_setup("cnn-small", 17)
    arrived = {name: array * np.float32(factor) for name, array in setup.weights.items()}
    assert [check for check in run_checks(replace(setup, arrived=arrived)) if not check.passed] == []


def test_weights_that_arrived_meet_no_patient():
    setup = make_setup()
    nobody = replace(setup, arrived={name: array + 1 for name, array in setup.weights.items()}).of_nobody()
    assert nobody.examples.num_rows == 0
    assert all((nobody.weights[name] == array + 1).all() for name, array in setup.weights.items())


def test_it_leaves_the_global_generators_as_they_were():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert red(make_setup(), NOISE, SAMPLING) == set()
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


# --- how it refuses, and what stays behind ---


def ask(setup):
    site = SimpleNamespace(config=SimpleNamespace(site=SimpleNamespace(device="cpu")))
    require_self_test(site, setup.plan, setup.privacy, SimpleNamespace(train=setup.examples))


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(self_test, "_PASSED", set())


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_that_crashes_has_failed(monkeypatch, fresh, name):
    def crash(setup):
        raise MemoryError

    green = {other: lambda setup: "" for other in CHECKS}
    monkeypatch.setattr(self_test, "CHECKS", green | {name: crash})
    with pytest.raises(Refusal, match=name) as refusal:
        ask(make_setup())
    assert refusal.value.code is RefusalCode.SELF_TEST
    assert "MemoryError" in refusal.value.why
    with pytest.raises(Refusal):  # a failure is not remembered as a pass
        ask(make_setup())


def test_it_runs_once_for_each_plan(monkeypatch, fresh):
    runs = []
    monkeypatch.setattr(
        self_test, "run_checks", lambda setup: runs.append(setup.privacy) or [Check(name="x", passed=True)]
    )
    for sigma in (1.0, 1.0, 2.0, 1.0):
        ask(make_setup(noise_multiplier=sigma))
    assert [privacy.noise_multiplier for privacy in runs] == [1.0, 2.0]


def test_nothing_stays_behind(fresh):
    setup = make_setup("cnn-small", 17)
    before = setup.examples.inputs["image"].copy()
    state = torch.get_rng_state()
    ask(setup)
    gc.collect()
    left = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor) and thing.ndim == 4 and thing.shape[-1] == 17
    ]
    assert left == []
    assert (setup.examples.inputs["image"] == before).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert not _global_optimizer_pre_hooks


@pytest.mark.parametrize(
    ("units", "draws", "rate"),
    [(60, 2000, 0.4), (5, 2000, 0.5), (1000, 300, 0.01), (3, 2000, 0.06), (400, 200, 0.9)],
)
def test_true_poisson_sampling_is_red_as_seldom_as_stated(monkeypatch, units, draws, rate):
    monkeypatch.setattr(self_test_checks, "ALPHA", 0.01)
    rng, hospitals = np.random.default_rng(units), 300
    reds = 0
    for _ in range(hospitals):
        chosen = rng.random((draws, units)) < rate
        overlap = int((chosen[1:] & chosen[:-1]).sum())
        reds += bool(not_poisson(chosen.sum(axis=0), chosen.sum(axis=1), overlap=overlap, rate=rate))
    # Two tests at 0.01 and two at a hundredth of it.
    assert stats.binom.sf(reds - 1, hospitals, 0.0202) > 1e-6
