"""Mutants of the noise: how much there is, where, and from which generator."""

import secrets

import numpy as np
import torch

import client.round
import client.training.private as training
from client.training.patient_optimizer import PatientDPOptimizer
from common.privacy import noise
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from tests.audit.mutants import mutant


def less_noise(patch, factor):
    real = PrivacyPlan.noise_stddev.fget
    patch.setattr(PrivacyPlan, "noise_stddev", property(lambda plan: factor * real(plan)))


@mutant("handling", caught_by="noise")
def sigma_five_percent_too_small(patch):
    """The noise has 95 % of the standard deviation that is charged."""
    less_noise(patch, 0.95)


@mutant("amplification", caught_by="noise")
def noise_shared_among_hospitals(patch):
    """Each hospital adds half of its noise because four of them are summed behind secure aggregation."""
    less_noise(patch, 0.5)


@mutant("handling", caught_by="repeated-noise")
def no_noise_on_the_last_parameter(patch):
    """Of several parameters the last one (a bias) is released as it is."""
    real = PatientDPOptimizer.add_noise

    def add_noise(self):
        last = self._parameters[-1]
        held = torch.zeros(last.shape) if last.summed_grad is None else last.summed_grad.clone()
        real(self)
        if len(self._parameters) > 1:
            last.grad = (held / self.plan.expected_batch_size).to(last.dtype)

    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)


@mutant("handling", caught_by="noise")
def no_noise_in_the_last_step(patch):
    """The last of several steps of a round releases its sum as it is."""
    real = PatientDPOptimizer.add_noise

    def add_noise(self):
        last = 0 < self.steps_taken == self.plan.steps - 1
        held = [
            torch.zeros(p.shape) if p.summed_grad is None else p.summed_grad.clone() for p in self._parameters
        ]
        real(self)
        for parameter, total in zip(self._parameters, held, strict=True):
            if last:
                parameter.grad = (total / self.plan.expected_batch_size).to(parameter.dtype)

    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)


@mutant("handling", caught_by="grid")
def noise_in_floating_point(patch):
    """The noise is not rounded to a grid, so that its last bits tell what it was added to."""

    def noise_block(into, spare, *, grid, stream):
        stream.fill_normal(into, grid.noise_stddev / grid.spacing)

    patch.setattr(noise, "noise_block", noise_block)


# --- from where ---


def noise_from(patch, stream_of, *, purposes=("noise",)):
    """Let the noise (or what `purposes` says), and nothing else, come from `stream_of(round, step)`."""
    real = SecureRandomness.stream

    def stream(self, *, purpose, round_number, step, part=0):
        if purpose in purposes:
            return stream_of(round_number, step)
        return real(self, purpose=purpose, round_number=round_number, step=step, part=part)

    patch.setattr(SecureRandomness, "stream", stream)


def seeding_first(patch, seed):
    """Let every hospital call `seed` before it trains."""
    for module in (training, client.round):
        real = module.train_privately

        def seeded(*, real=real, **arguments):
            seed()
            return real(**arguments)

        patch.setattr(module, "train_privately", seeded)


class TorchStream:
    """Numbers from torch's global generator."""

    def uniform(self, size):
        return torch.rand(size, dtype=torch.float64).numpy()

    def normal(self, size):
        return torch.randn(size, dtype=torch.float64).numpy()

    def fill_normal(self, into, stddev=1.0):
        into[:] = stddev * self.normal(len(into))

    def integers(self, high, size):
        return torch.randint(high, (size,) if isinstance(size, int) else size).numpy()

    def fill_integers(self, high, into):
        into[:] = self.integers(high, len(into))

    def permutation(self, n):
        return torch.randperm(n).numpy()


class NumpyStream:
    """Numbers from numpy's global generator."""

    def uniform(self, size):
        return np.random.random(size)

    def normal(self, size):
        return np.random.standard_normal(size)

    def fill_normal(self, into, stddev=1.0):
        into[:] = stddev * self.normal(len(into))

    def integers(self, high, size):
        return np.random.randint(high, size=size, dtype=np.int64)

    def fill_integers(self, high, into):
        into[:] = self.integers(high, len(into))

    def permutation(self, n):
        return np.random.permutation(n)


@mutant("T12", caught_by="noise")
def noise_from_torchs_seeded_generator(patch):
    """Noise comes from torch's global generator, which every hospital seeds with the federation's seed."""
    seeding_first(patch, lambda: torch.default_generator.manual_seed(0))
    noise_from(patch, lambda *_: TorchStream())


@mutant("T12", caught_by="noise")
def noise_from_numpys_seeded_generator(patch):
    """Noise comes from numpy's global generator, which every hospital seeds with the federation's seed."""
    seeding_first(patch, lambda: np.random.seed(0))
    noise_from(patch, lambda *_: NumpyStream())


@mutant("handling", caught_by="noise")
def noise_seeded_alike_at_all_hospitals(patch):
    """Noise is derived from the federation's seed, the round and the step."""
    same = ReproducibleRandomness(0, "everybody")
    noise_from(patch, lambda number, step: same.stream(purpose="noise", round_number=number, step=step))


@mutant("handling", caught_by="noise")
def noise_repeated_in_every_step(patch):
    """Each round draws its noise once and adds the same to every step."""
    drawn = {}

    def stream_of(round_number, step):
        if step == 0:
            drawn["seed"] = int(np.random.SeedSequence().entropy) % 2**31
        same = ReproducibleRandomness(drawn["seed"], "here")
        return same.stream(purpose="noise", round_number=round_number, step=0)

    noise_from(patch, stream_of)


@mutant("handling", caught_by="noise")
def pieces_of_noise_share_a_stream(patch):
    """Every piece of a step's noise begins the same stream anew, as if all were the same part of it."""
    drawn = {}
    real = PatientDPOptimizer.add_noise

    def add_noise(self):
        drawn["seed"] = secrets.randbits(62)
        real(self)
        drawn.clear()

    def stream_of(round_number, step):
        same = ReproducibleRandomness(drawn.get("seed", secrets.randbits(62)), "here")
        return same.stream(purpose="noise", round_number=round_number, step=step)

    patch.setattr(PatientDPOptimizer, "add_noise", add_noise)
    noise_from(patch, stream_of)


@mutant("handling", caught_by="repeated-draws")
def patients_drawn_by_a_seed_that_others_know(patch):
    """Who enters a step follows from the federation's seed, the round and the step."""
    same = ReproducibleRandomness(0, "everybody")
    noise_from(
        patch,
        lambda number, step: same.stream(purpose="sampling", round_number=number, step=step),
        purposes=("sampling",),
    )
