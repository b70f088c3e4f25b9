"""LiRA: it finds the patients of an overfitted model, no more than claimed under privacy, and would tell."""

import pytest

import simulations.audits.membership as membership
from common.privacy.randomness import SecureRandomness
from simulations.audits.finding import CLAIMED, EMPIRICAL
from simulations.audits.membership import audit_membership
from tests.audit.switched_off import noiseless

pytestmark = [pytest.mark.audit, pytest.mark.timeout(1200)]


def test_overfitted_models_give_their_patients_away_and_private_ones_do_not(tmp_path, found):
    finding = audit_membership(folder=tmp_path)
    for name, value in finding.numbers.items():
        found(name, value)
    assert finding.passed, finding.said
    assert finding.black_box
    assert finding.numbers["models of each kind"] >= 16
    assert finding.numbers["true positives at 1 % without privacy, lower limit"] > 0.02
    assert finding.numbers["epsilon without privacy, lower bound"] > finding.numbers[CLAIMED]
    assert finding.numbers[EMPIRICAL] <= finding.numbers[CLAIMED]
    assert [(tmp_path / name).read_bytes()[:4] for name in finding.pictures] == [b"\x89PNG"]


def test_noise_that_is_switched_off_silently_exceeds_the_claim(tmp_path, monkeypatch, found):
    noiseless(monkeypatch, SecureRandomness)
    finding = audit_membership(folder=tmp_path, quick=True)
    found("claimed epsilon", finding.numbers[CLAIMED])
    found("empirical epsilon, lower bound", finding.numbers[EMPIRICAL])
    assert not finding.passed
    assert finding.numbers[EMPIRICAL] > finding.numbers[CLAIMED]


def test_models_that_learnt_nothing_do_not_pass_for_private(tmp_path, monkeypatch):
    """An audit in which the attack fails without privacy has no power, and says so."""

    def barely(patients, steps, seed, real=membership._setup):
        return real(patients, 1, seed)

    monkeypatch.setattr(membership, "_setup", barely)
    assert not audit_membership(folder=tmp_path, quick=True).passed
