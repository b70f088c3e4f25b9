"""Audit B: whatever one patient's images are, adding the patient moves what is noised by at most C.

For every model of the registry, through `train_privately` itself, looked at where the noise is added; and the
audit notices three defects that it is there for. A bound on the sensitivity itself, no statistics.
Source: Tramer et al., Debugging Differential Privacy, arXiv 2202.12219.
"""

import numpy as np
import pytest
import torch

import client.patient_optimizer
import client.private_training
from client.private_training import train_privately
from common.config import ModelSpec, TrainingConfig
from common.examples import Examples
from common.models.names import model_names
from common.models.registry import build_model, initial_parameters, load_parameters
from common.preprocessing import Preprocessing
from common.privacy.randomness import ReproducibleRandomness
from common.tasks import Classification
from tests.audit.released_steps import watched_steps
from tests.client.dp_oracle import make_plan

pytestmark = pytest.mark.audit

KINDS = ("scaled", "nan", "infinite", "rare class", "duplicate", "black", "many images", "alone", "nothing")
RAGGED = (1, 3, 1, 2, 4, 1)
SIZE = 28
SCALED, NAN, INFINITE = 251, 252, 253
"""Values of the first pixel that make a record what no decoder would."""
TASK = Classification(classes=("negative", "positive"))


class Hostile(Preprocessing):
    """Lets records through that are scaled by 10,000 or not finite, as a defective decoder might."""

    def standardise(self, images):
        values, marks = super().standardise(images), images[:, 0, 0, 0]
        values[marks == SCALED] *= 1e4
        values[marks == NAN, 0, 3, 3] = np.nan
        values[marks == INFINITE, 0, 3, 3] = np.inf
        return values


def hospital(kind, *, with_patient, size=SIZE, lengths=RAGGED, rows_of_odd=2):
    """Patients with random films; the last one, when there, is `kind` of odd."""
    rng = np.random.default_rng(5)
    if kind in ("alone", "nothing"):
        lengths = ()
    odd_rows = {"many images": 9, "nothing": 0}.get(kind, rows_of_odd)
    lengths = (*lengths, odd_rows)
    units = np.repeat(np.arange(len(lengths)), lengths)
    images = rng.integers(0, 200, (len(units), 1, size, size), dtype=np.uint8)
    targets, odd = rng.integers(0, 2, len(units)), units == len(lengths) - 1
    if kind in ("scaled", "alone"):
        images[odd, 0, 0, 0] = SCALED
    elif kind in ("nan", "infinite"):
        images[np.flatnonzero(odd)[:1], 0, 0, 0] = NAN if kind == "nan" else INFINITE
    elif kind == "rare class":
        targets[:], targets[odd] = 0, 1
    elif kind == "duplicate":
        images[odd], targets[odd] = images[0], targets[0]
    elif kind == "black":
        images[odd] = 0
    everybody = Examples(
        inputs={"image": images},
        targets=targets,
        units=units,
        unit_ids=tuple(str(number) for number in range(len(lengths))),
    )
    return everybody if with_patient else everybody.select_units(np.arange(len(lengths) - 1))


def clipped_sum(name, examples, *, clip, chunk, size=SIZE, task=TASK):
    """What the production path holds just before the noise of a step that everybody enters."""
    spec = ModelSpec(name=name, channels=1, image_size=size, num_outputs=2)
    model = build_model(spec)
    load_parameters(model, initial_parameters(spec, seed=1))
    with watched_steps() as steps:
        train_privately(
            model=model,
            task=task,
            examples=examples,
            preprocessing=Hostile(image_size=size, channels=1),
            plan=make_plan(sampling_rate=1.0, l2_clip_norm=clip, max_rows_per_unit=4),
            training=TrainingConfig(physical_batch_size=chunk),
            round_number=1,
            num_rounds=1,
            randomness=ReproducibleRandomness(3, "here"),
            device=torch.device("cpu"),
        )
    (step,) = steps
    return step.clipped_sum


def moved_over_clip(name, kind, *, clip, chunk, **options):
    """By how much the patient moves the sum, in units of C."""
    where = {key: options.pop(key) for key in ("lengths", "rows_of_odd") if key in options}
    size = options.get("size", SIZE)
    sums = [
        clipped_sum(
            name,
            hospital(kind, with_patient=there, size=size, **where),
            clip=clip,
            chunk=chunk,
            **options,
        )
        for there in (True, False)
    ]
    assert all(np.isfinite(s).all() for s in sums)
    return float(np.linalg.norm(sums[0] - sums[1])) / clip


def largest_movement(name, *, kinds, clips, chunks, **options):
    largest = 0.0
    for kind in kinds:
        moved = [
            moved_over_clip(name, kind, clip=clip, chunk=chunk, **options)
            for clip in clips
            for chunk in chunks
        ]
        largest = max(largest, *moved)
        assert max(moved) <= 1 + 1e-5, kind
        if kind in ("nan", "infinite", "nothing"):
            assert max(moved) < 1e-4, kind  # such a patient counts as zero
        else:
            # The clip is what holds the patient: the bound is reached, not merely kept.
            assert max(moved) > 0.999, kind
    return largest


@pytest.mark.parametrize("name", [name for name in model_names() if name != "resnet18"])
def test_a_patient_moves_the_sum_by_at_most_c(name, found):
    largest = largest_movement(name, kinds=KINDS, clips=(0.05, 1.0), chunks=(1, 3, 256))
    found("excess of the largest movement over C", largest - 1)


def test_a_patient_moves_the_sum_of_resnet18_by_at_most_c(found):
    kinds = ("scaled", "nan", "rare class", "many images", "alone")
    largest = largest_movement(
        "resnet18", kinds=kinds, clips=(0.05,), chunks=(1, 256), size=16, lengths=(1, 3, 2)
    )
    found("excess of the largest movement over C", largest - 1)


# --- an audit that can fail ---


def test_the_audit_sees_gradients_that_are_not_clipped(monkeypatch):
    monkeypatch.setattr(
        client.patient_optimizer, "clip_factors", lambda norms, *, l2_clip_norm: torch.ones_like(norms)
    )
    assert moved_over_clip("cnn", "rare class", clip=0.05, chunk=256) > 1.5


def test_the_audit_sees_clipping_of_images_instead_of_patients(monkeypatch):
    real = client.private_training.accumulate_clipped_gradients

    def by_image(*arguments, segments, num_units, **others):
        real(*arguments, segments=torch.arange(len(segments)), num_units=len(segments), **others)

    monkeypatch.setattr(client.private_training, "accumulate_clipped_gradients", by_image)
    assert moved_over_clip("cnn", "rare class", clip=0.05, chunk=256, rows_of_odd=4) > 1.5


class ClassWeighted(Classification):
    """Trap T5: the divisor is the batch's, so one record of a rare class rescales everybody's gradient."""

    def losses(self, outputs, targets):
        weights = torch.where(targets == 1, 50.0, 1.0)
        return super().losses(outputs, targets) * weights * len(targets) / weights.sum()


def test_the_audit_sees_a_loss_that_couples_patients(monkeypatch):
    monkeypatch.setattr(client.private_training, "guard_losses", lambda task: None)
    task = ClassWeighted(classes=TASK.classes)
    # Not with a small clip, which undoes the scale of everybody's gradient alike.
    assert moved_over_clip("cnn", "rare class", clip=3.0, chunk=256, task=task) > 1.5
