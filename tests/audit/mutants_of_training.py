"""Mutants of clipping, of the loss and of what is left of a batch."""

from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleModuleNoOp
from torch import nn

import client.training.patient_optimizer as optimiser
import client.training.private as training
from client.training import copies
from client.training.patient_optimizer import PatientDPOptimizer
from client.training.per_row_layers import with_row_gradients
from client.training.row_gradients import Units
from common.models import convolutional
from common.preprocessing import Preprocessing
from common.tasks import Classification
from tests.audit.mutants import mutant, nothing

# --- clipping ---


@mutant("T1", caught_by="neighbours")
def adaptive_clipping_that_does_not_clip(patch):
    """The factor of every patient is 1, as in Opacus' adaptive ghost clipping."""
    patch.setattr(
        optimiser, "clip_factors", lambda norms, *, l2_clip_norm: torch.isfinite(norms).to(norms.dtype)
    )


@mutant("T2", caught_by="neighbours")
def clip_schedule_on_one_side(patch):
    """Gradients are clipped to a schedule's 4 C while the noise is made for C."""
    real = optimiser.clip_factors
    patch.setattr(
        optimiser, "clip_factors", lambda norms, *, l2_clip_norm: real(norms, l2_clip_norm=4 * l2_clip_norm)
    )


@mutant("T3", caught_by="neighbours")
def unwrapped_loss(patch):
    """The batch's own gradient is used, as ghost clipping does with a loss that was not wrapped."""

    def accumulate(self, segments, num_units, *, parameters=None):
        for parameter in self._parameters:
            rows, parameter.grad_sample = parameter.grad_sample, None
            if parameter.summed_grad is None:
                parameter.summed_grad = torch.zeros(parameter.shape, dtype=torch.float64)
            count = rows.rows
            each = Units.of(torch.arange(count), count, rows=count)
            rows.add_clipped(parameter.summed_grad, torch.ones(count, dtype=torch.float64), each, None)

    patch.setattr(PatientDPOptimizer, "accumulate", torch.no_grad()(accumulate))


@mutant("handling", caught_by="neighbours")
def clipping_of_images_instead_of_patients(patch):
    """Each image is clipped to C, so that a patient with four of them counts four times."""
    real = PatientDPOptimizer.accumulate

    def by_image(self, segments, num_units, **of):
        real(self, torch.arange(len(segments)), len(segments), **of)

    patch.setattr(PatientDPOptimizer, "accumulate", by_image)


@mutant("handling", caught_by="neighbours")
def clipping_of_chunks_instead_of_patients(patch):
    """The sum over a chunk of patients is clipped to C, as if a microbatch were one patient."""
    real = PatientDPOptimizer.accumulate

    def by_chunk(self, segments, num_units, **of):
        real(self, torch.zeros_like(segments), 1, **of)

    patch.setattr(PatientDPOptimizer, "accumulate", by_chunk)


@mutant("T8", caught_by="neighbours")
def one_broken_record_spoils_the_sum(patch):
    """A gradient that is not finite enters the sum instead of counting as zero."""
    patch.setattr(
        optimiser, "clip_factors", lambda norms, *, l2_clip_norm: (l2_clip_norm / norms).clamp(max=1)
    )


@mutant("T11", caught_by="slow-training")
def private_batch_size_as_divisor(patch):
    """The noisy sum is divided by how many patients really entered, not by q n."""
    real_accumulate, real_noise = PatientDPOptimizer.accumulate, PatientDPOptimizer.add_noise

    def accumulate(self, segments, num_units, **of):
        self.entered = getattr(self, "entered", 0) + num_units
        real_accumulate(self, segments, num_units, **of)

    def add_noise(self):
        real_noise(self)
        for parameter in self._parameters:
            parameter.grad *= self.plan.expected_batch_size / max(getattr(self, "entered", 0), 1)
        self.entered = 0

    patch.setattr(PatientDPOptimizer, "accumulate", accumulate)
    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)


@mutant("handling", caught_by="neighbours")
def chunks_of_as_many_rows_as_there_are_patients(patch):
    """Chunks are not filled up: one patient more picks other kernels for all, and chosen weights show it."""
    for name in ("input_tensor", "target_tensor"):
        real = getattr(copies, name)
        patch.setattr(copies, name, lambda *table, filled_to, real=real, **others: real(*table, **others))


# --- layers and losses ---


def without_guard_of_models(patch):
    patch.setattr(training, "guard_model", nothing)
    patch.setattr(training, "place_matters", lambda *_, **__: False)  # it would keep patients apart


@mutant("T4", caught_by="neighbours")
def batch_norm_without_parameters(patch):
    """BatchNorm with affine=False takes the place of GroupNorm, and the guard of models is out."""
    without_guard_of_models(patch)
    patch.setattr(
        convolutional,
        "group_norm",
        lambda channels: nn.BatchNorm2d(channels, affine=False, track_running_stats=False),
    )


class RunningMean(nn.Module):
    """Passes its input on and keeps a mean of it."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, inputs):
        if inputs.device.type != "meta":
            self.mean += 0.1 * (inputs.detach().mean(dim=(0, 2, 3)) - self.mean)
        return inputs


@mutant("handling", caught_by="slow-training")
def running_statistics_leave(patch):
    """A layer keeps a running mean of what it sees, and buffers leave with the weights, without noise."""
    without_guard_of_models(patch)
    patch.setattr(convolutional, "group_norm", RunningMean)

    def everything(model):
        return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}

    patch.setattr(training, "read_parameters", everything)


class ReflectingLayers:
    """torch.nn with convolutions that reflect at the border."""

    def __getattr__(self, name):
        return getattr(nn, name)

    @staticmethod
    def Conv2d(*arguments, **options):
        return nn.Conv2d(*arguments, **options | {"padding_mode": "reflect"})


@mutant("T10", caught_by="slow-training")
def padding_other_than_zeros(patch):
    """Convolutions reflect at the border, for which row gradients are others; the guard is out."""
    without_guard_of_models(patch)
    patch.setattr(convolutional, "nn", ReflectingLayers())


@mutant("T5", caught_by="neighbours-large-clip")
def class_weighted_mean_loss(patch):
    """The loss is divided by the class weights of the whole batch, and the guard of losses is out."""
    patch.setattr(training, "guard_losses", nothing)
    real = Classification.losses

    def losses(self, outputs, targets):
        weights = torch.where(targets == 1, 50.0, 1.0)
        return real(self, outputs, targets) * weights * len(targets) / weights.sum()

    patch.setattr(Classification, "losses", losses)


@mutant("T6", caught_by="neighbours")
def proximal_term_inside_the_clip_sum(patch):
    """A FedProx term is added per patient, scaled by the patient's clip factor and not clipped itself."""
    real_factors, real_accumulate = optimiser.clip_factors, PatientDPOptimizer.accumulate

    def accumulate(self, segments, num_units, *, parameters=None):
        total = []

        def factors(norms, *, l2_clip_norm):
            found = real_factors(norms, l2_clip_norm=l2_clip_norm)
            total.append(float(found[:num_units].sum()))
            return found

        with patch.context() as inner:
            inner.setattr(optimiser, "clip_factors", factors)
            real_accumulate(self, segments, num_units, parameters=parameters)
        self.settle()
        for parameter in self._parameters:
            parameter.summed_grad += total[0] * parameter.detach().double()

    patch.setattr(PatientDPOptimizer, "accumulate", torch.no_grad()(accumulate))


@mutant("T6", caught_by="slow-training")
def weight_decay_inside_the_loss(patch):
    """Weight decay is a term of the loss, which per-patient gradients drop without a word."""

    def accumulate(wrapped, task, optimizer, *, inputs, targets, segments, num_units):
        rows_of_unit = torch.bincount(segments, minlength=num_units)
        losses = task.losses(wrapped(inputs), targets)
        decay = 0.1 * sum(parameter.square().sum() for parameter in wrapped.parameters())
        ((losses[: len(segments)] / rows_of_unit[segments]).sum() + decay).backward()
        optimizer.accumulate(segments, num_units)

    patch.setattr(training, "accumulate_clipped_gradients", accumulate)
    patch.setattr(training, "decay_weights", nothing)


@mutant("handling", caught_by="neighbours")
def statistics_of_the_batch_in_preprocessing(patch):
    """Pictures are centred by the mean of those that are computed with them, not by a constant."""
    real = Preprocessing.standardise

    def centred(self, images):
        values = real(self, images)
        return values - values.mean(axis=(0, 2, 3), keepdims=True) if len(values) else values

    patch.setattr(Preprocessing, "standardise", centred)


# --- what is left of a batch ---


@mutant("T7", caught_by="interrupted-round")
def half_a_batch_stays(patch):
    """A round that breaks off leaves its sum behind, the next one starts with it; the guard is out."""
    patch.setattr(training, "guard_optimizer", nothing)
    real = PatientDPOptimizer.__init__

    def start(self, optimizer, **others):
        held = [getattr(p, "summed_grad", None) for p in optimizer.param_groups[0]["params"]]
        real(self, optimizer, **others)
        for parameter, total in zip(self._parameters, held, strict=True):
            parameter.summed_grad = total

    patch.setattr(PatientDPOptimizer, "__init__", start)

    @contextmanager
    def per_row_gradients(model, *, fixed_kernels=True):
        with with_row_gradients(model, fixed_kernels=fixed_kernels):
            yield GradSampleModuleNoOp(model, loss_reduction="sum")

    patch.setattr(training, "per_row_gradients", per_row_gradients)


@mutant("T7", caught_by="neighbours")
def a_batch_enters_later_releases_too(patch):
    """The sum is not cleared after a step, so that a patient counts again in each later one."""
    real = PatientDPOptimizer.add_noise

    def add_noise(self):
        held = [None if p.summed_grad is None else p.summed_grad.clone() for p in self._parameters]
        real(self)
        for parameter, total in zip(self._parameters, held, strict=True):
            parameter.summed_grad = total

    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)


@mutant("handling", caught_by="neighbours")
def momentum_before_the_noise(patch):
    """A moving sum of gradients without noise is kept over the steps and released with each."""
    real = PatientDPOptimizer.add_noise

    def add_noise(self):
        for parameter in self._parameters:
            held = parameter.summed_grad
            if held is not None:
                moment = getattr(self, "moments", {}).get(id(parameter), 0.0)
                parameter.summed_grad = held + 0.9 * moment
                self.__dict__.setdefault("moments", {})[id(parameter)] = parameter.summed_grad.clone()
        real(self)

    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)


@mutant("handling", caught_by="noise")
def training_stops_when_patients_are_learned(patch):
    """Once the clipped sum is almost zero the remaining steps are left out, which tells that it was."""
    real = PatientDPOptimizer.step

    def step(self, closure=None):
        self.settle()
        held = [p.summed_grad for p in self._parameters if p.summed_grad is not None]
        learned = sum(float(total.square().sum()) for total in held) < (1e-3 * self.plan.l2_clip_norm) ** 2
        if self.steps_taken and held and learned:
            self.zero_grad()
        else:
            real(self, closure)

    patch.setattr(PatientDPOptimizer, "step", step)
