"""Accounting audits of a whole hospital: charged is what was done, claimed is what it costs."""

import pytest

import client.evaluation
import client.round
import client.training.private
from client.ledger.ledger import Ledger
from common.privacy.plan import PrivacyEvent, PrivacyPlan
from simulations.audits.accounting import audit_accounting, audit_charged_counts, recomputed_epsilon

pytestmark = pytest.mark.audit


@pytest.mark.parametrize("policy", [{}, {"mode": "solve", "epsilon": 3.0}], ids=["fixed", "solve"])
def test_updates_hold_what_the_ledger_was_charged_for(policy, passes):
    finding = audit_accounting(policy=policy)
    passes(finding)
    charged = finding.numbers["steps charged for an update"]
    assert finding.numbers["noisy steps in an update"] == pytest.approx(charged, rel=0.05)


def test_counts_are_noised_and_charged(passes):
    passes(audit_charged_counts())


def test_the_cost_is_recomputed_without_our_accountant():
    """Opacus, tests/accountants_test.py: q 0.04, sigma 1.5, 2249 steps at 1e-5 cost 6.777 by PRV."""
    cost = recomputed_epsilon(sampling_rate=0.04, noise_multiplier=1.5, steps=2249, delta=1e-5)
    assert cost == pytest.approx(6.777, abs=0.02)


# --- an audit that can fail ---


def small(**changes):
    return audit_accounting(rounds=3, **changes)


def test_the_audit_sees_an_answer_with_less_noise_than_charged(monkeypatch, fails):
    real = client.round.train_privately

    def cheating(*, plan, **others):
        less = PrivacyPlan(**plan.to_dict() | {"noise_multiplier": 0.9 * plan.noise_multiplier})
        return real(plan=less, **others)

    monkeypatch.setattr(client.round, "train_privately", cheating)
    fails(small(), "noisy steps")


def test_the_audit_sees_more_steps_than_are_charged(monkeypatch, fails):
    real = client.round.train_privately

    def busy(*, plan, **others):
        more = PrivacyPlan(**plan.to_dict() | {"steps": plan.steps + 1})
        return real(plan=more, **others)

    monkeypatch.setattr(client.round, "train_privately", busy)
    fails(small(), "noisy steps")


def test_the_audit_sees_steps_that_are_not_counted(monkeypatch, fails):
    real = PrivacyPlan.event

    def forgetful(plan):
        return PrivacyEvent(**real(plan).to_dict() | {"steps": max(1, plan.steps - 1)})

    monkeypatch.setattr(PrivacyPlan, "event", forgetful)
    monkeypatch.setattr(client.round, "_require_plan_of_run", lambda *_: None)  # it would refuse round 2
    fails(small(), "charged for 1 steps, done 2")


def test_the_audit_sees_a_client_rate_multiplied_in(monkeypatch, fails):
    real = PrivacyPlan.event

    def amplified(plan):
        return PrivacyEvent(**real(plan).to_dict() | {"sampling_rate": 0.1 * plan.sampling_rate})

    monkeypatch.setattr(PrivacyPlan, "event", amplified)
    monkeypatch.setattr(client.round, "_require_plan_of_run", lambda *_: None)
    fails(small(), "charged for sampling rate 0.05, done 0.5")


def test_the_audit_sees_an_accountant_that_says_too_little(monkeypatch, fails):
    import client.ledger.ledger

    for name in ("running_epsilon", "epsilon"):
        real = getattr(client.ledger.ledger, name, None)
        if real is not None:
            monkeypatch.setattr(
                client.ledger.ledger,
                name,
                lambda events, *, delta, real=real: 0.9 * real(events, delta=delta),
            )
    import client.ledger.costs

    for name in ("running_epsilon", "epsilon"):
        real = getattr(client.ledger.costs, name, None)
        if real is not None:
            monkeypatch.setattr(
                client.ledger.costs, name, lambda events, *, delta, real=real: 0.9 * real(events, delta=delta)
            )
    fails(small(), "claims epsilon")


def test_the_audit_sees_counts_without_noise(monkeypatch, fails):
    monkeypatch.setattr(client.evaluation, "noised", lambda plan, counts, **_: dict(counts))
    fails(audit_charged_counts(evaluations=4), "noise of the counts")


def test_the_audit_sees_counts_that_nobody_paid_for(monkeypatch, fails):
    real = Ledger.charge

    def once(ledger, key, *, purpose="training", **others):
        standing = [c for c in ledger.charges() if c.purpose == purpose == "evaluation"]
        return standing[0] if standing else real(ledger, key, purpose=purpose, **others)

    monkeypatch.setattr(Ledger, "charge", once)
    monkeypatch.setattr(Ledger, "mark_sealed", lambda *_, **__: None)
    fails(audit_charged_counts(evaluations=4), "4 releases of counts and 1 charges")
