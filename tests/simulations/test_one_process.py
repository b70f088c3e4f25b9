"""A federation in one process: the update of its round is the weighted mean of what hospitals would send."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from client.training.private import train_privately
from common.config import FederationConfig
from common.errors import ConfigError
from common.examples import concatenate
from common.models.registry import build_model, initial_parameters, load_parameters
from common.parameters import difference
from common.preprocessing import Preprocessing
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from common.settings import parse
from common.tasks import task_of
from simulations.one_process import Together, main, noise_together, rounds_together
from tests.client.training.dp_oracle import examples_of, make_plan

CONFIG = parse(
    FederationConfig,
    {
        "federation": {"rounds": 1},
        "data": {"image-size": 8},
        "model": {"name": "softmax"},
        "privacy": {"sampling-rate": 1.0},
        "server": {"optimizer": "momentum"},
    },
    source="test",
)
PATIENTS = (10, 30)
FAINT = 1e-5


def renamed(examples, name):
    return replace(examples, unit_ids=tuple(f"{name} {unit}" for unit in examples.unit_ids))


def test_a_round_is_the_weighted_mean_of_the_hospitals_updates():
    hospitals = [renamed(examples_of([1] * count, seed=count), count) for count in PATIENTS]
    plan = make_plan(sampling_rate=1.0, noise_multiplier=FAINT, l2_clip_norm=1.0)
    start = initial_parameters(CONFIG.model_spec, seed=0)
    updates = []
    for count, examples in zip(PATIENTS, hospitals, strict=True):
        model = build_model(CONFIG.model_spec)
        load_parameters(model, start)
        result = train_privately(
            model=model,
            task=task_of(CONFIG),
            examples=examples,
            preprocessing=Preprocessing(image_size=8, channels=1),
            plan=replace(plan, enrolled_units=count),
            training=CONFIG.training,
            round_number=1,
            num_rounds=1,
            randomness=SecureRandomness(),
            device=torch.device("cpu"),
        )
        updates.append(difference(result.parameters, start))
    together = Together(
        config=CONFIG,
        task=task_of(CONFIG),
        examples=concatenate(hospitals),
        plan=replace(plan, enrolled_units=sum(PATIENTS), noise_multiplier=FAINT),
    )
    (found,) = rounds_together(together, randomness=ReproducibleRandomness(0, "here"))
    expected = {
        name: sum(n * update[name] for n, update in zip(PATIENTS, updates, strict=True)) / sum(PATIENTS)
        for name in start
    }
    for name, moved in difference(found, start).items():
        assert np.allclose(moved, expected[name], atol=20 * FAINT)
    assert max(np.abs(values).max() for values in expected.values()) > 1000 * FAINT


def test_each_hospital_gets_the_epsilon_that_was_asked_for():
    config = CONFIG.model_copy(update={"federation": CONFIG.federation.model_copy(update={"rounds": 20})})
    alone = [noise_together(config, [count], epsilon=3.0) for count in (950, 400)]
    for sigma, count in zip(alone, (950, 400), strict=True):
        event = PrivacyEvent(sampling_rate=1.0, noise_multiplier=sigma, steps=20)
        assert 2.98 < epsilon([event], delta=1 / (10 * count)) <= 3.0
    assert noise_together(config, [950, 400], epsilon=3.0) == pytest.approx(math.hypot(*alone))


@pytest.mark.parametrize(
    "section",
    [
        {"privacy": {"local-steps": 2}},
        {"training": {"optimizer": "adam"}},
        {"training": {"momentum": 0.5}},
        {"server": {"weighting": "squares"}, "wire": {"bits": 32}},
    ],
)
def test_what_is_not_one_sum_is_refused(section):
    with pytest.raises(ConfigError):
        noise_together(parse(FederationConfig, section, source="test"), [100], epsilon=3.0)


def test_the_command_prints_a_line_for_each_seed(capsys):
    arguments = ["--hospitals", "2", "--model", "softmax", "--rounds", "2", "--seeds", "0,1"]
    assert main([*arguments, "--set", "augmentation.shift=0.1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    for line in lines:
        assert set(line["scores"]) == {"last", "ema 0.9", "ema 0.95", "ema 0.98"}
        assert all(0 <= scores["test"]["auc"] <= 1 for scores in line["scores"].values())
