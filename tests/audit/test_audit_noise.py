"""Noise audits: as large as stated, in every number, fresh every time; and they notice defects."""

import pytest
import torch

from client.training.patient_optimizer import PatientDPOptimizer
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from simulations.audits.noise import audit_noise, audit_noise_black_box

pytestmark = pytest.mark.audit

BOTH = pytest.mark.parametrize("audit", [audit_noise, audit_noise_black_box], ids=["white box", "black box"])


def test_every_step_holds_the_stated_noise(passes):
    finding = audit_noise()
    passes(finding)
    assert finding.numbers["numbers"] >= 2_000_000
    assert finding.numbers["deviation of sigma that would be seen, %"] < 0.5


def test_updates_hold_the_stated_noise(passes):
    finding = audit_noise_black_box(rounds=12)
    passes(finding)
    assert finding.black_box
    assert finding.numbers["deviation of sigma that would be seen, %"] < 2


# --- an audit that can fail ---


@BOTH
@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_the_audit_sees_a_sigma_that_is_off_by_five_percent(monkeypatch, audit, factor, fails):
    real = PrivacyPlan.noise_stddev.fget
    monkeypatch.setattr(PrivacyPlan, "noise_stddev", property(lambda plan: factor * real(plan)))
    fails(audit(), "variance")


def test_the_audit_sees_one_percent_too_little_noise(monkeypatch, fails):
    real = PrivacyPlan.noise_stddev.fget
    monkeypatch.setattr(PrivacyPlan, "noise_stddev", property(lambda plan: 0.99 * real(plan)))
    fails(audit_noise(), "variance")


def test_the_audit_sees_a_forgotten_parameter(monkeypatch, fails):
    real = PatientDPOptimizer.add_noise

    def forgetting(optimizer):
        bias = optimizer.params[1]
        held = torch.zeros(bias.shape) if bias.summed_grad is None else bias.summed_grad.clone()
        real(optimizer)
        bias.grad = (held / optimizer.expected_batch_size).float()

    monkeypatch.setattr(PatientDPOptimizer, "add_noise", forgetting)
    fails(audit_noise(hospitals=1, rounds=1), "each parameter")


def noise_of(monkeypatch, stream_of):
    """Let the noise come from `stream_of(round_number, step)`, everything else from secure randomness."""
    real = SecureRandomness.stream

    def stream(source, *, purpose, round_number, step, part=0):
        if purpose == "noise":
            return stream_of(round_number, step)
        return real(source, purpose=purpose, round_number=round_number, step=step, part=part)

    monkeypatch.setattr(SecureRandomness, "stream", stream)


@BOTH
def test_the_audit_sees_noise_that_comes_again(monkeypatch, audit, fails):
    same = ReproducibleRandomness(5, "everywhere")
    noise_of(monkeypatch, lambda *_: same.stream(purpose="noise", round_number=0, step=0))
    fails(audit(), "no noise twice")


@BOTH
def test_the_audit_sees_hospitals_that_draw_from_a_seeded_global_generator(monkeypatch, audit, fails):
    class Global:
        def normal(self, size):
            return torch.randn(size, dtype=torch.float64).numpy()

        def integers(self, high, size):
            return torch.randint(high, (size,)).numpy()

        def fill_normal(self, into, stddev=1.0):
            into[:] = stddev * self.normal(len(into))

        def fill_integers(self, high, into):
            into[:] = self.integers(high, len(into))

    noise_of(monkeypatch, lambda *_: Global())
    fails(audit(), "no noise twice")


def test_the_audit_sees_noise_that_is_drawn_once_for_a_whole_round(monkeypatch, fails):
    """Black-box: the sum of three steps then varies nine times as much as one, not three times."""
    sources = {}

    def once(round_number, step):
        if step == 0:
            sources["now"] = ReproducibleRandomness(int(torch.seed() % 2**31), "here")
        return sources["now"].stream(purpose="noise", round_number=0, step=0)

    noise_of(monkeypatch, once)
    fails(audit_noise_black_box(), "variance of 3 steps")
