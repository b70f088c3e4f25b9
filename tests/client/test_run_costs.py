"""What a run is said to have cost: the worst of all patients whom it ever had, never less, not for others."""

import math
import random

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from client.ledger.ledger import Ledger
from client.ledger.records import EVALUATION, TRAINING
from common.errors import BudgetError
from common.messages import RoundKey
from common.privacy.plan import PrivacyEvent

DELTA = 1e-4


def exact(sigmas):
    """Gaussians compose to one Gaussian; its exact epsilon is that of Balle and Wang 2018, theorem 8."""
    mu = math.sqrt(sum(1 / sigma**2 for sigma in sigmas))

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - DELTA

    return brentq(excess, 0, 50) if mu and excess(0) > 0 else 0.0


def gaussian(sigma):
    return PrivacyEvent(sampling_rate=1.0, noise_multiplier=sigma, steps=1)


def charge(ledger, run, number, sigma, ids, *, purpose=TRAINING, composition="site", limit=50.0):
    return ledger.charge(
        RoundKey(run_id=run, attempt=1, round_number=number, model_hash=f"{number:064x}"),
        event=gaussian(sigma),
        cohort=ledger.cohort(ids),
        delta=DELTA,
        limit=limit,
        purpose=purpose,
        composition=composition,
    )


@pytest.fixture
def ledger(tmp_path):
    return Ledger.open(tmp_path / "ledger")


@pytest.mark.parametrize("composition", ["site", "patient", "changing"])
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.audit)])
def test_every_honest_history_is_stated_in_full_and_verifies(ledger, composition, seed):
    """Cohorts come, go and change sides, over two runs; compared with each patient's own Gaussians."""
    draw, limit = random.Random(seed), 3.0
    went_through = {}  # patient -> [(run, purpose, sigma)]
    refused = 0
    for number in range(1, 15):
        run, purpose = draw.choice("XY"), draw.choice([TRAINING, EVALUATION])
        sigma, ids = draw.choice([4.0, 6.0]), draw.sample("abcdef", draw.choice([1, 3]))
        rule = draw.choice(["site", "patient"]) if composition == "changing" else composition
        try:
            stated = charge(
                ledger, run, number, sigma, ids, purpose=purpose, composition=rule, limit=limit
            ).epsilon
        except BudgetError:
            refused += 1
            continue
        for patient in ids:
            went_through.setdefault(patient, []).append((run, purpose, sigma))
        mine = {p: [(w, s) for r, w, s in events if r == run] for p, events in went_through.items()}
        costs = [exact([s for _, s in events]) for events in mine.values() if purpose in dict(events)]
        assert stated >= max(costs) - 1e-6
        everything = [s for events in mine.values() for _, s in events]
        assert stated <= exact(everything) * 1.01
        if rule == "patient":
            assert stated <= max(costs) * 1.01
    worst = max(exact([s for _, _, s in events]) for events in went_through.values())
    assert ledger.spent(DELTA).epsilon == pytest.approx(worst, rel=1e-3)
    assert worst <= limit
    assert refused < 14 - 4
    assert ledger.verify() == []


@pytest.mark.parametrize("composition", ["site", "patient"])
def test_who_has_left_the_run_still_counts(ledger, composition):
    """p trains twice, is moved to validation, and leaves: the run has cost p more than anybody who stayed."""
    for number in (1, 2):
        charge(ledger, "R", number, 6.0, ["a", "p"], composition=composition)
    moved = charge(ledger, "R", 2, 4.0, ["v", "p"], purpose=EVALUATION, composition=composition)
    later = charge(ledger, "R", 3, 6.0, ["a"], composition=composition)
    assert moved.epsilon == pytest.approx(exact([6.0, 6.0, 4.0]), rel=1e-2)
    assert later.epsilon == pytest.approx(exact([6.0, 6.0, 4.0]), rel=1e-2)
    assert later.epsilon >= exact([6.0, 6.0, 4.0])
    assert ledger.verify() == []


@pytest.mark.parametrize("composition", ["site", "patient"])
def test_training_does_not_pay_for_the_evaluations_of_others(ledger, composition):
    charge(ledger, "R", 1, 30.0, ["a", "b"], composition=composition)
    counts = charge(ledger, "R", 1, 3.0, ["v"], purpose=EVALUATION, composition=composition)
    training = charge(ledger, "R", 2, 30.0, ["a", "b"], composition=composition)
    assert counts.epsilon == pytest.approx(exact([3.0]), rel=1e-2)
    assert training.epsilon == pytest.approx(exact([30.0, 30.0]), rel=1e-2)
    (run,) = ledger.spent(DELTA).runs
    assert run.epsilon == run.site_epsilon == pytest.approx(exact([3.0]), rel=1e-3)
    assert ledger.verify() == []


def test_a_run_within_the_limit_is_shown_within_it_and_the_next_run_pays_for_both(ledger):
    limit = 1.05 * exact([4.0, 4.0])
    for number in (1, 2):
        charge(ledger, "R", number, 4.0, ["a"], limit=limit)
        charge(ledger, "R", number, 4.0, ["v"], purpose=EVALUATION, limit=limit)
    spent = ledger.spent(DELTA)
    assert spent.runs[0].site_epsilon <= limit
    assert spent.epsilon <= limit
    assert spent.site_epsilon == pytest.approx(exact([4.0] * 4), rel=1e-3)
    assert "of a new run" in spent.in_words()
    with pytest.raises(BudgetError):
        charge(ledger, "S", 1, 50.0, ["n"], limit=limit)


def test_an_understated_cost_of_who_has_left_is_found(ledger, monkeypatch):
    """The ledger as it would be had it forgotten p: `verify` is not green for everything."""
    import client.ledger.costs

    for number in (1, 2):
        charge(ledger, "R", number, 4.0, ["a", "p"], composition="patient")
    monkeypatch.setattr(client.ledger.costs, "members_of", lambda *_: frozenset())
    charge(ledger, "R", 3, 4.0, ["n"], composition="patient")
    assert [(finding.kind, finding.charge) for finding in ledger.verify()] == [("epsilon", 3)]
