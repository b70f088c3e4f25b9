"""How long a private step takes here, and whether it is private: the plan's model on random images.

No patient is looked at.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.features import on_features
from client.self_test.setup import Setup
from client.self_test.start import Check as SelfTestCheck
from client.self_test.start import run_checks
from client.training.out_of_memory import explained_memory
from client.training.private import train_privately
from common.config import PublicPlan
from common.examples import Examples
from common.models.registry import build_model, initial_parameters, load_parameters
from common.preprocessing import Preprocessing
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import SecureRandomness
from common.series import IMAGE, PRESENT, YEARS
from common.tasks import task_of

MOST_UNITS = 256
"""A step on more patients is measured on so many and scaled."""


def dry_step_seconds(plan: PublicPlan, *, enrolled_patients: int, device: torch.device) -> float:
    """Seconds of one DP-SGD step of the plan with one image per patient, after a first one to warm up.

    Raises ModelError, GuardError, and FederationError with what to change when memory does not suffice.
    """
    expected = max(1, round(plan.privacy.sampling_rate * enrolled_patients))
    units = min(expected, MOST_UNITS)
    with explained_memory(physical_batch_size=plan.training.physical_batch_size, device=device):
        _step(plan, units=units, device=device)
        return _step(plan, units=units, device=device) * expected / units


def dry_self_test(plan: PublicPlan, *, enrolled_patients: int, device: torch.device) -> list[SelfTestCheck]:
    """The self-test that a run of the plan begins with, on random images and at a noise multiplier of 1."""
    privacy = PrivacyPlan(
        sampling_rate=plan.privacy.sampling_rate,
        l2_clip_norm=plan.privacy.l2_clip_norm,
        noise_multiplier=1.0,
        steps=plan.privacy.local_steps,
        enrolled_units=enrolled_patients,
        max_rows_per_unit=plan.privacy.max_images_per_patient,
        unit=plan.data.unit,
        clipping=plan.privacy.clipping,
    )
    examples = _random_examples(plan, units=MOST_UNITS)
    return run_checks(Setup(plan=plan, privacy=privacy, examples=examples, device=device))


def _random_examples(plan: PublicPlan, *, units: int) -> Examples:
    data, task = plan.data, task_of(plan)
    random = np.random.default_rng(0)
    picture = (data.channels, data.image_size, data.image_size)
    shape = (units, data.steps, *picture) if data.series_form.is_series else (units, *picture)
    inputs: dict[str, NDArray[Any]] = {IMAGE: random.integers(0, 256, shape, dtype=np.uint8)}
    if data.series_form.is_series:  # the longest: they take the most time
        inputs |= {PRESENT: np.ones(shape[:2], np.float32), YEARS: np.ones(shape[:2], np.float32)}
    return Examples(
        inputs=inputs,
        targets=random.integers(0, task.target_values, (units, *task.target_shape), dtype=np.int64),
        units=np.arange(units, dtype=np.int64),
        unit_ids=tuple(f"random {number}" for number in range(units)),
    )


def _step(plan: PublicPlan, *, units: int, device: torch.device) -> float:
    data = plan.data
    examples = _random_examples(plan, units=units)
    model = build_model(plan.model_spec)
    load_parameters(model, initial_parameters(plan.model_spec, seed=0))
    trainable = on_features(
        model,
        spec=plan.model_spec,
        examples=examples,
        preprocessing=Preprocessing.of(plan),
        device=device,
        changing=plan.augmentation.is_on,
    )
    result = train_privately(
        model=trainable.model,
        task=task_of(plan),
        examples=trainable.examples,
        preprocessing=trainable.preprocessing,
        plan=PrivacyPlan(
            sampling_rate=1.0,
            l2_clip_norm=plan.privacy.l2_clip_norm,
            noise_multiplier=1.0,
            steps=1,
            enrolled_units=units,
            max_rows_per_unit=plan.privacy.max_images_per_patient,
            unit=data.unit,
            clipping=plan.privacy.clipping,
        ),
        training=plan.training,
        round_number=1,
        num_rounds=1,
        randomness=SecureRandomness(),
        device=device,
        augmentation=plan.augmentation,
    )
    return result.ended_at - result.started_at
