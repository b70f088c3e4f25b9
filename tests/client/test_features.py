"""Features of a model's fixed stage: the same as without keeping them, computed once, each image alone."""

import numpy as np
import pytest
import torch

import client.features
from client.features import features_of, on_features
from client.self_test.setup import Setup
from client.self_test.start import run_checks
from client.training.plain import TrainingStopped
from client.training.private import train_privately
from common.augmentation import AugmentationSection
from common.config import ModelSpec, PublicPlan, TrainingConfig
from common.examples import Examples
from common.models.fixed_stage import fixed_stage
from common.models.registry import build_model
from common.preprocessing import Preprocessing
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import ReproducibleRandomness
from common.settings import parse
from common.tasks import make_task

SIDE, ROWS = 16, 70
CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(image_size=SIDE, channels=1)
SPEC = ModelSpec(name="scattering", channels=1, image_size=SIDE, num_outputs=2)

PRIVACY = PrivacyPlan(
    sampling_rate=1.0,
    l2_clip_norm=0.2,
    noise_multiplier=1.0,
    steps=2,
    enrolled_units=40,
    max_rows_per_unit=2,
    unit="patient",
)


def make_examples(rows=ROWS):
    random = np.random.default_rng(3)
    return Examples(
        inputs={"image": random.integers(0, 256, (rows, 1, SIDE, SIDE), dtype=np.uint8)},
        targets=(np.arange(rows) % 2).astype(np.int64),
        units=(np.arange(rows) // 2).astype(np.int64),
        unit_ids=tuple(f"patient-{number}" for number in range(-(-rows // 2))),
    )


def prepared(model, examples, **others):
    return on_features(model, spec=SPEC, examples=examples, preprocessing=PREPROCESSING, device=CPU, **others)


def trained(model, examples, preprocessing):
    result = train_privately(
        model=model,
        task=make_task("classification", ("negative", "positive")),
        examples=examples,
        preprocessing=preprocessing,
        plan=PRIVACY,
        training=TrainingConfig(learning_rate=4.0),
        round_number=1,
        num_rounds=2,
        randomness=ReproducibleRandomness(1, "north"),
        device=CPU,
    )
    return result.parameters


def test_training_on_features_is_training_of_the_model():
    examples = make_examples()
    whole = trained(build_model(SPEC), examples, PREPROCESSING)
    model = build_model(SPEC)
    parts = prepared(model, examples)
    on_kept = trained(parts.model, parts.examples, parts.preprocessing)
    assert on_kept.keys() == whole.keys() == {"output.weight"}
    np.testing.assert_allclose(on_kept["output.weight"], whole["output.weight"], atol=1e-6)
    assert np.array_equal(model.output.weight.detach().numpy(), on_kept["output.weight"])


def test_features_are_computed_once_for_the_same_examples(monkeypatch):
    computed = []
    real = client.features.features_of
    monkeypatch.setattr(client.features, "features_of", lambda *a, **k: computed.append(1) or real(*a, **k))
    examples = make_examples()
    first, again = prepared(build_model(SPEC), examples), prepared(build_model(SPEC), examples)
    assert first.examples is again.examples
    assert first.examples.unit_ids == examples.unit_ids
    prepared(build_model(SPEC), make_examples())
    assert len(computed) == 2


def test_the_features_of_an_image_have_the_same_bits_in_any_company():
    stage, examples = fixed_stage(build_model(SPEC)), make_examples()
    features = features_of(stage, examples, preprocessing=PREPROCESSING, device=CPU)
    without_first = examples.select_units(range(1, examples.num_units))
    others = features_of(stage, without_first, preprocessing=PREPROCESSING, device=CPU)
    assert np.array_equal(features[2:], others)


def test_where_the_place_matters_each_image_is_computed_alone(monkeypatch):
    stage, examples = fixed_stage(build_model(SPEC)), make_examples(3)
    monkeypatch.setattr(client.features, "_place_matters", lambda *_: True)
    shapes = []
    stage.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    features_of(stage, examples, preprocessing=PREPROCESSING, device=CPU)
    assert shapes == [(1, 1, SIDE, SIDE)] * 3


def test_too_many_for_memory_or_no_fixed_stage_leave_everything_as_it_is(monkeypatch):
    monkeypatch.setattr(client.features, "MOST_BYTES", 1000)
    examples, model = make_examples(), build_model(SPEC)
    assert prepared(model, examples).model is model
    assert prepared(model, examples).examples is examples
    plain = build_model(ModelSpec(name="softmax", channels=1, image_size=SIDE, num_outputs=2))
    assert prepared(plain, examples).preprocessing is PREPROCESSING


def test_a_deadline_ends_it():
    with pytest.raises(TrainingStopped):
        prepared(build_model(SPEC), make_examples(), stop=lambda: True)


def test_the_self_test_of_a_hospital_passes_on_features():
    values = {
        "federation": {"rounds": 2},
        "data": {"image-size": SIDE, "classes": ("negative", "positive")},
        "model": {"name": "scattering"},
        "privacy": {"sampling-rate": 1.0, "l2-clip-norm": 0.2},
        "training": {"learning-rate": 4.0},
    }
    plan = parse(PublicPlan, values, source="test")
    setup = Setup(plan=plan, privacy=PRIVACY, examples=make_examples(), device=CPU)
    assert [check.reason for check in run_checks(setup) if not check.passed] == []
    assert type(setup.model()) is torch.nn.Sequential
    assert setup.inputs_of(make_examples(3)).inputs["image"].shape == (3, 1001)


def test_changing_images_have_no_features_to_keep():
    """Under augmentation the whole model sees each step's images."""
    model, examples = build_model(SPEC), make_examples(rows=12)
    found = prepared(model, examples, changing=True)
    assert (found.model, found.examples, found.preprocessing) == (model, examples, PREPROCESSING)
    results = [
        train_privately(
            model=build_model(SPEC),
            task=make_task("classification", ("negative", "positive")),
            examples=examples,
            preprocessing=PREPROCESSING,
            plan=PRIVACY,
            training=TrainingConfig(learning_rate=4.0),
            round_number=1,
            num_rounds=1,
            randomness=ReproducibleRandomness(0, "here"),
            device=CPU,
            augmentation=AugmentationSection(shift=shift),
        ).parameters["output.weight"]
        for shift in (0.0, 0.1, 0.1)
    ]
    assert np.array_equal(results[1], results[2])
    assert not np.array_equal(results[0], results[1])
