"""Neighbour audits: adding a patient moves what is noised by at most C; and they notice defects that they are
there for (more of them in the mutation suite).
"""

import pytest
import torch

import client.training.patient_optimizer
import client.training.private
from client.training.patient_optimizer import PatientDPOptimizer
from common.tasks import Classification
from simulations.audits.neighbours import (
    Case,
    audit_neighbours,
    audit_neighbours_black_box,
    clipped_sum,
    movement,
    released_sum,
)
from simulations.audits.probe import TASK
from tests.model_names import FIRST_OF_FAMILY, OF_SERIES, SHALLOW

pytestmark = pytest.mark.audit

BOTH = pytest.mark.parametrize("see", [clipped_sum, released_sum], ids=["white box", "black box"])


@pytest.mark.parametrize("name", [*SHALLOW, *OF_SERIES])
def test_a_patient_moves_the_sum_by_at_most_c(name, passes):
    passes(audit_neighbours(models=(name,)))


@pytest.mark.parametrize("name", FIRST_OF_FAMILY)
def test_a_patient_moves_the_sum_of_a_deep_model_by_at_most_c(name, passes):
    kinds = ("scaled", "nan", "rare class", "many images", "alone")
    passes(
        audit_neighbours(
            models=(name,), kinds=kinds, clips=(0.05,), chunks=(1, 256), size=16, lengths=(1, 3, 2)
        )
    )


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("augmentations", [1, 3])
def test_a_patient_moves_the_sum_by_at_most_c_with_copies_and_automatic_clipping(
    clipping, augmentations, passes
):
    passes(
        audit_neighbours(models=("cnn-small",), clips=(0.05,), clipping=clipping, augmentations=augmentations)
    )


def test_the_audit_sees_automatic_clipping_that_lets_long_gradients_through(monkeypatch):
    monkeypatch.setattr(
        client.training.patient_optimizer,
        "automatic_factors",
        lambda norms, *, l2_clip_norm: l2_clip_norm / (norms.sqrt() + 0.01),
    )
    case = Case(model="cnn-small", clip=0.05, chunk=256, clipping="automatic")
    assert movement(clipped_sum, "scaled", case) > 1.1


def test_a_patient_moves_the_update_by_at_most_c(passes):
    finding = audit_neighbours_black_box()
    passes(finding)
    assert finding.black_box


# --- an audit that can fail ---


@BOTH
def test_the_audit_sees_gradients_that_are_not_clipped(monkeypatch, see):
    monkeypatch.setattr(
        client.training.patient_optimizer,
        "clip_factors",
        lambda norms, *, l2_clip_norm: torch.ones_like(norms),
    )
    assert movement(see, "rare class", Case(model="cnn", clip=0.05, chunk=256)) > 1.5


@BOTH
def test_the_audit_sees_clipping_of_images_instead_of_patients(monkeypatch, see):
    real = client.training.private.accumulate_clipped_gradients

    def by_image(*arguments, segments, num_units, **others):
        real(*arguments, segments=torch.arange(len(segments)), num_units=len(segments), **others)

    monkeypatch.setattr(client.training.private, "accumulate_clipped_gradients", by_image)
    assert movement(see, "rare class", Case(model="cnn", clip=0.05, chunk=256, rows_of_odd=4)) > 1.5


class ClassWeighted(Classification):
    """Trap T5: the divisor is the batch's, so one record of a rare class rescales everybody's gradient."""

    def losses(self, outputs, targets):
        weights = torch.where(targets == 1, 1000.0, 1.0)  # far above the rows that only fill a chunk
        return super().losses(outputs, targets) * weights * len(targets) / weights.sum()


@BOTH
def test_the_audit_sees_a_loss_that_couples_patients(monkeypatch, see):
    monkeypatch.setattr(client.training.private, "guard_losses", lambda task: None)
    # Not with a small clip, which undoes the scale of everybody's gradient alike.
    case = Case(model="cnn", clip=3.0, chunk=256, task=ClassWeighted(classes=TASK.classes))
    assert movement(see, "rare class", case) > 1.5


def test_the_audit_sees_what_a_step_leaves_to_the_next(monkeypatch, fails):
    """Trap T7, in one process: the sum of the step before is not forgotten."""
    real = PatientDPOptimizer.add_noise

    def remembering(optimizer):
        held = [None if p.summed_grad is None else p.summed_grad.clone() for p in optimizer.params]
        real(optimizer)
        for parameter, total in zip(optimizer.params, held, strict=True):
            parameter.summed_grad = total

    monkeypatch.setattr(PatientDPOptimizer, "add_noise", remembering)
    fails(audit_neighbours_black_box(models=(), kinds=()), "several steps")


def test_the_audit_sees_one_broken_record_in_the_sum(monkeypatch, fails):
    monkeypatch.setattr(
        client.training.patient_optimizer,
        "clip_factors",
        lambda norms, *, l2_clip_norm: (l2_clip_norm / norms).clamp(max=1),
    )
    fails(audit_neighbours_black_box(models=("softmax",), kinds=("nan", "duplicate")), "nan")
