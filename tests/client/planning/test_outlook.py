"""What is planned is what is trained: noise, epsilon, rounds, and what remains; exactly."""

import numpy as np
import pytest

from client.ledger.ledger import Ledger
from client.planning.outlook import (
    afforded,
    look_ahead,
    neighbouring_studies,
    other_budgets,
    other_noise,
    run_noise,
    spent_before,
    update_noise,
)
from common import messages
from common.errors import RefusalCode
from common.messages import refusal_code
from common.parameters import from_record, template_of
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from tests.client.planning.planned_hospital import enrol, found, outlook_of, train
from tests.client.small_hospital import ENROLLED, charges, make_hospital, make_plan, weights_of
from tests.client.test_policy import hospital as on_paper

pytestmark = pytest.mark.usefixtures("flower_identity")
DELTA = 1 / (10 * ENROLLED)


def rounds_of(answers):
    return [answer for answer in answers if messages.ARRAYS in answer]


def spent(toml):
    return Ledger.examine(toml.parent / "ledger").spent(DELTA)


def affordable(toml, noise, **more):
    hospital = found(toml, **more)
    return afforded(
        hospital.config, hospital.study, hospital.histories, noise_multiplier=noise, unit=hospital.unit
    )


# --- plan and training cannot disagree ---


@pytest.mark.parametrize("policy", [{"mode": "solve", "epsilon": 4.0}, {"noise_multiplier": 3.0}], ids=str)
def test_the_planned_noise_and_epsilon_are_those_that_the_ledger_has_after_the_run(tmp_path, policy):
    toml, study = make_hospital(tmp_path / "north", **policy), make_plan()
    enrol(toml, study)
    planned = outlook_of(toml)
    assert planned.rounds == study.federation.rounds
    assert planned.refusal == ""

    answers = train(toml, study)
    assert len(rounds_of(answers)) == planned.rounds
    assert {a["metrics"]["noise-multiplier"] for a in answers} == {planned.plan.noise_multiplier}
    assert {charge.plan_digest for charge in charges(toml)} == {planned.plan.digest()}
    assert all(charge.event == planned.plan.event() for charge in charges(toml))
    (run,) = spent(toml).runs
    assert (run.noise_multiplier, run.epsilon) == (planned.plan.noise_multiplier, planned.epsilon)
    assert spent(toml).epsilon == planned.epsilon_after == planned.epsilon
    assert planned.delta == DELTA
    assert planned.epsilon_after <= planned.budget


@pytest.mark.parametrize(("noise", "budget"), [(1.5, 8.0), (4.0, 2.0)])
def test_as_many_rounds_are_trained_as_were_afforded_and_then_the_budget_is_spent(tmp_path, noise, budget):
    toml = make_hospital(tmp_path / "north", noise_multiplier=noise, epsilon=budget)
    study = make_plan(federation={"rounds": 40})
    enrol(toml, study)
    planned, fit = outlook_of(toml), affordable(toml, noise)
    assert 1 < fit.rounds == planned.rounds < 40
    assert not fit.is_ceiling

    answers = train(toml, study)
    assert len(rounds_of(answers)) == fit.rounds
    assert refusal_code(answers[-1]) is RefusalCode.BUDGET
    assert spent(toml).epsilon == planned.epsilon_after


def test_a_budget_of_exactly_three_rounds_affords_three(tmp_path):
    three = PrivacyEvent(sampling_rate=0.5, noise_multiplier=2.0, steps=6)
    toml = make_hospital(tmp_path / "north", epsilon=epsilon([three], delta=DELTA))
    enrol(toml)
    assert (affordable(toml, 2.0).rounds, outlook_of(toml).rounds) == (3, 3)
    assert len(rounds_of(train(toml, make_plan()))) == 3


# --- what the ledger holds ---


@pytest.mark.audit  # many compositions: 20 s
def test_an_earlier_run_on_the_same_patients_lowers_what_is_left(tmp_path):
    toml, study = make_hospital(tmp_path / "north", mode="solve", epsilon=6.0), make_plan()
    enrol(toml, study)
    fresh, fresh_rounds = outlook_of(toml), affordable(toml, 6.0).rounds
    assert len(rounds_of(train(toml, study, run_id="elsewhere", rounds=2))) == 2

    behind = found(toml)
    event = fresh.plan.event()
    before = PrivacyEvent(sampling_rate=0.5, noise_multiplier=event.noise_multiplier, steps=4)
    assert spent_before(behind.config, behind.histories) == epsilon([before], delta=DELTA) > 0
    planned = outlook_of(toml)
    assert planned.plan.noise_multiplier > fresh.plan.noise_multiplier
    assert planned.epsilon < fresh.epsilon
    assert 0 < affordable(toml, 6.0).rounds < fresh_rounds
    assert outlook_of(toml, with_ledger=False) == fresh

    # And this second plan is what is trained, too.
    train(toml, study, run_id="second")
    assert charges(toml)[-1].event == planned.plan.event()
    assert spent(toml).runs[-1].epsilon == planned.epsilon
    assert spent(toml).epsilon == planned.epsilon_after <= 6.0


def test_after_an_earlier_run_the_rounds_that_are_left_are_trained(tmp_path):
    toml = make_hospital(tmp_path / "north", noise_multiplier=2.0, epsilon=4.0)
    study = make_plan(federation={"rounds": 30})
    enrol(toml, study)
    fresh = outlook_of(toml).rounds
    train(toml, study, run_id="elsewhere", rounds=2)
    left = outlook_of(toml).rounds
    assert 0 < left == fresh - 2 == affordable(toml, 2.0).rounds
    assert len(rounds_of(train(toml, study))) == left


def test_new_patients_of_the_same_site_have_their_budget_whole_where_composition_is_by_patient(tmp_path):
    north = make_hospital(tmp_path / "north")
    train(north, make_plan())
    images = make_hospital(tmp_path / "other").parent / "data" / "images.npz"
    with np.load(images, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    (patients,) = (name for name in arrays if name.endswith("_patients"))
    arrays[patients] = np.char.add("new ", arrays[patients].astype(str))
    np.savez(tmp_path / "new.npz", **arrays)
    behind = {}
    for composition in ("patient", "site"):
        second = make_hospital(
            tmp_path / composition,
            data=str(tmp_path / "new.npz"),
            site={"ledger": str(north.parent / "ledger")},
            composition=composition,
        )
        enrol(second)
        behind[composition] = list(found(second).histories)
    enrol(north)
    assert behind["patient"] == [()]
    assert behind["site"] == list(found(north).histories) != [()]


def test_patients_whose_budget_is_spent_are_refused_in_the_plan_as_in_training(tmp_path):
    toml, study = make_hospital(tmp_path / "north", epsilon=6.0), make_plan(federation={"rounds": 30})
    enrol(toml, study)
    train(toml, study)
    planned = outlook_of(toml)
    assert planned.plan is None
    assert "does not fit the budget" in planned.refusal
    assert affordable(toml, 2.0).rounds == 0
    assert refusal_code(train(toml, study, run_id="next")[0]) is RefusalCode.BUDGET


# --- what a number means ---


def test_the_noise_of_an_update_is_as_long_as_planned(tmp_path):
    """Noise alone, far above what any gradient can be: its length against lr * steps * C."""
    rate, clip, rounds = 0.25, 0.5, 8
    toml = make_hospital(tmp_path / "north", noise_multiplier=400.0)
    study = make_plan(
        federation={"rounds": rounds},
        training={"learning-rate": rate},
        privacy={"l2-clip-norm": clip, "local-steps": 3},
    )
    enrol(toml, study)
    planned, weights = outlook_of(toml).plan, weights_of(study)
    updates = [
        np.concatenate(
            [a.ravel() for a in from_record(answer[messages.ARRAYS], template_of(weights)).values()]
        )
        for answer in train(toml, study)
    ]
    longest = rate * 3 * clip
    lengths = [np.linalg.norm(update) / longest for update in updates]
    d = sum(array.size for array in weights.values())
    # d * rounds squared normals: their mean is within 6 standard errors.
    assert np.mean(np.square(lengths)) == pytest.approx(
        update_noise(planned, d) ** 2, rel=6 * np.sqrt(2 / (d * rounds))
    )
    mean = np.linalg.norm(np.mean(updates, axis=0)) / longest
    assert mean**2 == pytest.approx(run_noise(planned, d, rounds=rounds) ** 2, rel=6 * np.sqrt(2 / d))


# --- other choices ---


def test_the_neighbours_are_half_and_twice_and_hold_the_study_itself():
    def tried(**sections):
        return [
            (s.federation.rounds, s.privacy.sampling_rate)
            for s in neighbouring_studies(make_plan(**sections))
        ]

    nine = tried(federation={"rounds": 20}, privacy={"sampling-rate": 0.1})
    assert nine == [(r, q) for r in (10, 20, 40) for q in (0.05, 0.1, 0.2)]
    assert tried(federation={"rounds": 1}, privacy={"sampling-rate": 1.0}) == [
        (r, q) for r in (1, 2) for q in (0.25, 0.5, 1.0)
    ]
    assert {q for _, q in tried(privacy={"sampling-rate": 0.6})} == {0.3, 0.6, 1.0}


def test_other_budgets_solve_for_their_noise_and_more_budget_needs_less():
    config, study = on_paper(mode="fixed", noise_multiplier=50.0), make_plan(privacy={"sampling-rate": 1.0})
    solved = [look_ahead(other, study, [()]) for other in other_budgets(config)]
    assert [one.budget for one in solved] == [1.0, 3.0, 8.0]
    noise = [one.plan.noise_multiplier for one in solved]
    assert noise == sorted(noise, reverse=True)
    for one in solved:
        assert one.budget * 0.98 < one.epsilon <= one.budget


def test_other_noise_keeps_the_planned_one_and_the_floors():
    study = make_plan(privacy={"minimum-noise-multiplier": 3.0})
    config = on_paper(mode="fixed", noise_multiplier=4.567, maximum_noise_multiplier=10.0)
    plan = look_ahead(config, study, [()]).plan
    tried = other_noise(config, study, plan)
    assert 4.567 in tried
    assert all(3.0 <= noise <= 10.0 for noise in tried)
    assert other_noise(config, study, None) == [4.0, 8.0]


def test_the_policy_ends_what_the_budget_would_allow():
    config = on_paper(mode="fixed", noise_multiplier=400.0, maximum_rounds=50, maximum_steps=60)
    many = afforded(config, make_plan(), [()], noise_multiplier=400.0)
    assert (many.rounds, many.is_ceiling) == (30, True)  # 60 steps, two in a round


@pytest.mark.parametrize(
    ("policy", "sections", "words"),
    [
        ({"maximum_rounds": 3}, {}, "maximum-rounds"),
        ({"minimum_patients": 2000}, {}, "enrolled patients"),
        ({}, {"federation": {"private": False}}, "without privacy"),
        ({"maximum_noise_multiplier": 0.4}, {}, "maximum-noise-multiplier"),
    ],
)
def test_what_the_policy_forbids_is_a_refusal_in_words(policy, sections, words):
    planned = look_ahead(on_paper(**policy), make_plan(**sections), [()])
    assert planned.plan is None
    assert words in planned.refusal
    assert planned.fix


@pytest.mark.parametrize("federation", [{"private": False}, {"reproducible": True}])
def test_a_run_without_a_claim_has_no_epsilon(federation):
    config = on_paper(allow_non_private=True, mode="fixed", noise_multiplier=5.0)
    planned = look_ahead(config, make_plan(federation=federation), [()])
    assert (planned.refusal, planned.epsilon, planned.epsilon_after) == ("", None, None)
    assert planned.rounds == 4
