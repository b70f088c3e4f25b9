"""Losses of single records against formulas by hand and against torch's own."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, one_hot

from common.losses import class_losses, column_losses
from common.task_kinds import LOSSES
from common.tasks import make_task

GENERATOR = torch.Generator().manual_seed(0)
OUTPUTS = 3 * torch.randn(40, 4, generator=GENERATOR)
CLASSES = torch.arange(40) % 4
THERE = (torch.rand(40, 4, generator=GENERATOR) < 0.5).float()


def test_bce_and_mse_are_torchs_own():
    against_rest = one_hot(CLASSES, 4).float()
    bce = class_losses("bce", OUTPUTS, CLASSES, focal_gamma=2)
    torch.testing.assert_close(bce.mean(), binary_cross_entropy_with_logits(OUTPUTS, against_rest))
    mse = class_losses("mse", OUTPUTS, CLASSES, focal_gamma=2)
    torch.testing.assert_close(mse.mean(), mse_loss(OUTPUTS.softmax(1), against_rest))
    columns = column_losses("bce", OUTPUTS, THERE, focal_gamma=2)
    torch.testing.assert_close(columns.mean(), binary_cross_entropy_with_logits(OUTPUTS, THERE))
    columns = column_losses("mse", OUTPUTS, THERE, focal_gamma=2)
    torch.testing.assert_close(columns.mean(), mse_loss(OUTPUTS.sigmoid(), THERE))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_is_the_formula_of_the_paper(gamma):
    logits = OUTPUTS.double().numpy()
    of_target = softmax(logits, axis=1)[np.arange(40), CLASSES]
    expected = -((1 - of_target) ** gamma) * log_softmax(logits, axis=1)[np.arange(40), CLASSES]
    found = class_losses("focal", OUTPUTS, CLASSES, focal_gamma=gamma)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
    right = np.where(THERE == 1, expit(logits), expit(-logits))
    found = column_losses("focal", OUTPUTS, THERE, focal_gamma=gamma)
    np.testing.assert_allclose(found, -((1 - right) ** gamma) * np.log(right), rtol=2e-4, atol=1e-6)


def test_focal_at_gamma_zero_is_cross_entropy():
    found = class_losses("focal", OUTPUTS, CLASSES, focal_gamma=0)
    torch.testing.assert_close(found, cross_entropy(OUTPUTS, CLASSES, reduction="none"))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
def test_a_record_that_is_known_for_sure_has_a_finite_gradient(gamma):
    """(1 - p)^gamma at p = 1 has an infinite slope for gamma < 1, which a clipped sum would count as zero."""
    for loss, targets in ((class_losses, torch.tensor([0])), (column_losses, torch.tensor([[1.0, 0.0]]))):
        outputs = torch.tensor([[200.0, -200.0]], requires_grad=True)
        loss("focal", outputs, targets, focal_gamma=gamma).sum().backward()
        assert torch.isfinite(outputs.grad).all()


def test_the_worked_numbers_of_the_docstring():
    zeros, first = torch.zeros(1, 2), torch.tensor([0])
    by_hand = {"cross-entropy": math.log(2), "bce": math.log(2), "focal": math.log(2) / 4, "mse": 0.25}
    for name, expected in by_hand.items():
        assert float(class_losses(name, zeros, first, focal_gamma=2)) == pytest.approx(expected)


@pytest.mark.parametrize(("task", "loss"), [(task, loss) for task in LOSSES for loss in LOSSES[task]])
def test_gradient_of_a_record_has_the_same_bits_whatever_the_others_are(task, loss):
    made = make_task(task, ["a", "b", "c"], loss=loss, class_weights=(0.5, 1.0, 7.0))
    shape = (6, *made.target_shape)
    targets = torch.arange(math.prod(shape)).reshape(shape) % made.target_values
    outputs = torch.randn(6, made.num_outputs, requires_grad=True)

    def gradient_of_first(answers):
        return torch.autograd.grad(made.losses(outputs, answers).sum(), outputs)[0][0]

    others = (made.target_values - 1) - targets
    others[0] = targets[0]
    assert torch.equal(gradient_of_first(targets), gradient_of_first(others))
    assert made.losses(outputs, targets).shape == (6,)


def test_weights_are_public_constants_on_the_loss_of_their_own_class():
    outputs, targets = torch.randn(9, 3), torch.arange(9) % 3
    for loss in LOSSES["classification"]:
        plain = make_task("classification", "abc", loss=loss).losses(outputs, targets)
        heavy = make_task("classification", "abc", loss=loss, class_weights=(1, 2, 3)).losses(
            outputs, targets
        )
        torch.testing.assert_close(heavy, plain * torch.tensor([1.0, 2.0, 3.0])[targets])
    there = torch.tensor([[1, 0, 1]])
    each = binary_cross_entropy_with_logits(outputs[:1], there.float(), reduction="none")
    heavy = make_task("multi-label", "abc", class_weights=(1, 2, 3)).losses(outputs[:1], there)
    torch.testing.assert_close(heavy, (each * torch.tensor([1.0, 2.0, 3.0])).mean(1))
    level = make_task("ordinal", "abc").losses(outputs[:, :2], targets)
    heavy = make_task("ordinal", "abc", class_weights=(1, 2, 3)).losses(outputs[:, :2], targets)
    torch.testing.assert_close(heavy, level * torch.tensor([1.0, 2.0, 3.0])[targets])


def test_after_bce_classes_are_sigmoids_divided_by_their_sum():
    task = make_task("classification", "abcd", loss="bce")
    said = task.probabilities(OUTPUTS)
    alone = expit(OUTPUTS.double().numpy())
    np.testing.assert_allclose(said, alone / alone.sum(axis=1, keepdims=True), rtol=1e-12)
