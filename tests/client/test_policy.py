"""The policy: what a server may ask, how much noise follows, and with which code it is refused."""

from dataclasses import replace

import pytest

from client.limits import Behind, affordable_rounds
from client.policy import TrainingRequest, agree, require_allowed
from common.config import PrivacyKnobs, PublicPlan
from common.errors import BudgetError, PolicyError, Refusal, RefusalCode
from common.hospital_config import HospitalConfig
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from common.settings import parse

N = 1000


def hospital(**policy):
    values = {
        "hospital": {"name": "north", "enrolled-patients": N},
        "data": {"path": "x.npz"},
        "policy": {"epsilon": 3.0, **{key.replace("_", "-"): value for key, value in policy.items()}},
    }
    return parse(HospitalConfig, values, source="test")


def request(*, rounds=6, round_number=1, private=True, reproducible=False, **knobs):
    return TrainingRequest(
        rounds=rounds,
        round_number=round_number,
        knobs=PrivacyKnobs(**{"sampling_rate": 1.0, **knobs}),
        private=private,
        reproducible=reproducible,
        unit="patient",
        image_size=28,
        classes=("normal", "opacity"),
        model="softmax",
        task="classification",
    )


def ask(config, asked, histories=((),), run=(), **more):
    return agree(config, asked, Behind(histories=histories, run_events=run), **more)


def events(plan, rounds):
    event = plan.event()
    return PrivacyEvent(
        sampling_rate=event.sampling_rate, noise_multiplier=event.noise_multiplier, steps=event.steps * rounds
    )


def test_solved_noise_spends_the_budget_over_all_rounds_and_not_more():
    config = hospital()
    plan = ask(config, request(local_steps=2, sampling_rate=0.5))
    assert (plan.enrolled_units, plan.steps, plan.unit) == (N, 2, "patient")
    assert config.delta == 1 / (10 * N)
    assert 2.99 < epsilon([events(plan, 6)], delta=config.delta) <= 3.0


def test_solved_noise_is_kept_and_the_last_round_still_fits_exactly():
    config = hospital()
    first = ask(config, request())
    for number in range(2, 7):
        past = [(events(first, number - 1),)]
        plan = ask(
            config,
            request(round_number=number),
            past,
            earlier_noise_multiplier=first.noise_multiplier,
        )
        assert plan == first
    with pytest.raises(BudgetError) as caught:
        ask(config, request(), [(events(first, 6),)], earlier_noise_multiplier=first.noise_multiplier)
    assert caught.value.refusal is RefusalCode.BUDGET
    told = str(caught.value)
    for words in ("used: epsilon ", "of the limit 3", "asked: ", "would make it", "never for these patients"):
        assert words in told


def test_a_budget_that_no_noise_fits_tells_used_asked_limit_and_when():
    past = [(), (PrivacyEvent(sampling_rate=1, noise_multiplier=2.0, steps=40),)]
    with pytest.raises(BudgetError) as caught:
        ask(hospital(), request(), past)
    told = str(caught.value).splitlines()
    assert len(told) == 3
    assert "rounds from 1 to 6" in told[0]
    assert "limit 3" in told[1]
    assert "asked: 6 step(s) at noise multiplier 500" in told[1]
    assert "policy.epsilon" in told[2]


def test_what_was_spent_elsewhere_raises_the_noise():
    config = hospital()
    past = [(PrivacyEvent(sampling_rate=1, noise_multiplier=10.0, steps=4),), ()]
    plan = ask(config, request(), past)
    assert plan.noise_multiplier > ask(config, request()).noise_multiplier
    assert epsilon([*past[0], events(plan, 6)], delta=config.delta) <= 3.0


def test_joining_late_solves_for_the_rounds_that_remain():
    assert (
        ask(hospital(), request(round_number=5)).noise_multiplier
        < ask(hospital(), request()).noise_multiplier
    )


@pytest.mark.parametrize(
    ("policy", "asked", "expected"),
    [
        ({"minimum_noise_multiplier": 20.0}, {}, 20.0),
        ({}, {"minimum_noise_multiplier": 30.0}, 30.0),
        ({"mode": "fixed", "noise_multiplier": 8.0}, {}, 8.0),
        ({"mode": "fixed", "noise_multiplier": 8.0}, {"minimum_noise_multiplier": 9.0}, 9.0),
        ({"mode": "fixed", "noise_multiplier": 8.0}, {"minimum_noise_multiplier": 1.0}, 8.0),
        ({"mode": "fixed", "noise_multiplier": 8.0, "minimum_noise_multiplier": 10.0}, {}, 10.0),
    ],
)
def test_floors_and_the_server_only_raise_the_noise(policy, asked, expected):
    assert ask(hospital(**policy), request(**asked)).noise_multiplier == expected


def test_a_server_cannot_lower_the_noise_that_the_budget_needs():
    needed = ask(hospital(), request()).noise_multiplier
    assert ask(hospital(), request(minimum_noise_multiplier=0.0)).noise_multiplier == needed


@pytest.mark.parametrize(
    ("policy", "asked"),
    [
        ({"maximum_clip_norm": 1.0}, {"l2_clip_norm": 1e9}),
        ({"maximum_local_steps": 10}, {"local_steps": 11}),
        ({"maximum_rounds": 5}, {"rounds": 6}),
        ({"maximum_noise_multiplier": 1.0}, {}),
        ({"maximum_noise_multiplier": 20.0}, {"minimum_noise_multiplier": 21.0}),
        ({"maximum_noise_multiplier": 20.0, "mode": "fixed", "noise_multiplier": 21.0}, {}),
        ({"minimum_patients": N + 1}, {}),
        ({}, {"round_number": 7}),
        ({}, {"round_number": 0}),
    ],
)
def test_what_the_policy_forbids_is_refused_by_its_code(policy, asked):
    with pytest.raises(PolicyError) as caught:
        ask(hospital(**policy), request(**asked))
    assert caught.value.refusal is RefusalCode.POLICY


def test_ceilings_themselves_are_allowed():
    config = hospital(maximum_clip_norm=2.0, maximum_local_steps=2, maximum_rounds=6, minimum_patients=N)
    assert ask(config, request(l2_clip_norm=2.0, local_steps=2)).l2_clip_norm == 2.0


def test_a_run_with_other_classes_than_the_hospitals_is_refused():
    config = hospital()
    named = config.model_copy(update={"data": config.data.model_copy(update={"classes": ("a", "b")})})
    with pytest.raises(PolicyError, match="classes"):
        ask(named, request())


@pytest.mark.parametrize("asked", [{"private": False}, {"reproducible": True}])
def test_training_without_a_claim_must_be_allowed_by_the_hospital(asked):
    with pytest.raises(Refusal) as caught:
        ask(hospital(), request(**asked))
    assert caught.value.code is RefusalCode.NOT_PRIVATE
    plan = ask(hospital(allow_non_private=True), request(**asked))
    if "private" in asked:
        assert plan is None
    else:
        # A rehearsal adds the noise of the private run.
        assert plan == ask(hospital(), request())


def test_ceilings_hold_without_privacy_too():
    with pytest.raises(PolicyError):
        ask(hospital(allow_non_private=True, maximum_rounds=5), request(private=False))


def test_a_spent_budget_is_a_budget_refusal_in_both_modes():
    past = [(PrivacyEvent(sampling_rate=1, noise_multiplier=1.0, steps=5),)]
    for policy in ({}, {"mode": "fixed", "noise_multiplier": 8.0}):
        with pytest.raises(BudgetError) as caught:
            ask(hospital(**policy), request(), past)
        assert caught.value.refusal is RefusalCode.BUDGET
        assert caught.value.fix


def test_fixed_mode_with_a_budget_for_three_rounds_trains_three_times():
    delta = 1 / (10 * N)
    three = PrivacyEvent(sampling_rate=1, noise_multiplier=6.0, steps=6)
    config = hospital(mode="fixed", noise_multiplier=6.0, epsilon=epsilon([three], delta=delta))
    past = ()
    trained = 0
    for number in range(1, 7):
        try:
            plan = ask(config, request(round_number=number, local_steps=2), [past])
        except BudgetError:
            break
        assert affordable_rounds(config, plan, Behind(histories=[past])) == 3 - trained
        trained += 1
        past = (*past, plan.event())
    assert trained == 3


def test_the_worst_patient_decides():
    light = (PrivacyEvent(sampling_rate=1, noise_multiplier=20.0, steps=1),)
    heavy = (PrivacyEvent(sampling_rate=1, noise_multiplier=3.0, steps=8),)
    config = hospital(mode="fixed", noise_multiplier=6.0)
    assert ask(config, request(), [light]).noise_multiplier == 6.0
    for order in ([light, heavy], [heavy, light]):
        with pytest.raises(BudgetError):
            ask(config, request(), order)


def test_the_request_is_read_from_the_public_plan():
    plan = PublicPlan.model_validate(
        {"federation": {"rounds": 9, "reproducible": True}, "privacy": {"local-steps": 4}}
    )
    asked = TrainingRequest.of(plan, round_number=3, unit="image")
    assert (asked.rounds, asked.round_number, asked.remaining_rounds) == (9, 3, 7)
    assert (asked.private, asked.reproducible, asked.unit) == (True, True, "image")
    assert asked.knobs.local_steps == 4
    assert (asked.model, asked.task) == (plan.model.name, plan.data.task)


# --- what one run may spend ---


def of(noise, steps):
    return PrivacyEvent(sampling_rate=1, noise_multiplier=noise, steps=steps)


def test_a_run_with_a_cap_of_its_own_is_solved_for_the_cap_and_leaves_the_rest():
    config = hospital(run_epsilon=1.0)
    plan = ask(config, request())
    assert 0.99 < epsilon([events(plan, 6)], delta=config.delta) <= 1.0
    # Solving for a budget of 1 gives the same noise; another run finds two thirds of the budget.
    assert plan == ask(hospital(epsilon=1.0), request())
    second = ask(config, request(), [(events(plan, 6),)])
    assert second == plan


def test_where_less_than_the_cap_is_left_the_budget_decides():
    config = hospital(run_epsilon=2.0)
    past = [(of(6.0, 16),)]
    plan = ask(config, request(), past)
    whole = epsilon([*past[0], events(plan, 6)], delta=config.delta)
    assert 2.99 < whole <= 3.0
    assert epsilon([events(plan, 6)], delta=config.delta) < 2.0


@pytest.mark.audit  # many compositions: 20 s
def test_with_fixed_noise_the_cap_ends_the_run_and_not_the_budget():
    delta = 1 / (10 * N)
    cap = epsilon([of(6.0, 4)], delta=delta)
    config = hospital(mode="fixed", noise_multiplier=6.0, epsilon=50.0, run_epsilon=cap)
    elsewhere, run = (of(6.0, 30),), ()
    for number in (1, 2):
        behind = Behind(histories=[(*elsewhere, *run)], run_events=run)
        asked = request(round_number=number, local_steps=2)
        assert affordable_rounds(config, ask(config, asked), behind) == 3 - number
        plan = ask(config, asked, behind.histories, run)
        run = (*run, plan.event())
    with pytest.raises(BudgetError) as caught:
        ask(config, request(round_number=3, local_steps=2), [(*elsewhere, *run)], run)
    assert caught.value.refusal is RefusalCode.BUDGET
    for words in (f"{cap:.4g}", "policy.run-epsilon", "asked: 2 step(s) at noise multiplier 6"):
        assert words in str(caught.value)
    # Another run begins with nothing of its own behind it.
    assert ask(config, request(local_steps=2), [(*elsewhere, *run)]) == plan


def test_a_cap_below_any_noise_is_a_matter_of_policy_not_of_a_spent_budget():
    with pytest.raises(PolicyError, match="more noise"):
        ask(hospital(run_epsilon=0.01, maximum_noise_multiplier=50.0), request())


def test_what_a_person_approved_is_a_cap_with_a_code_of_its_own():
    config = hospital(mode="fixed", noise_multiplier=6.0, epsilon=50.0)
    cap = epsilon([of(6.0, 2)], delta=config.delta)
    plan = ask(config, request(round_number=2), [(of(6.0, 1),)], (of(6.0, 1),), approved_epsilon=cap)
    with pytest.raises(Refusal) as caught:
        ask(config, request(round_number=3), [(of(6.0, 2),)], (of(6.0, 2),), approved_epsilon=cap)
    assert caught.value.code is RefusalCode.APPROVAL
    assert plan.noise_multiplier == 6.0
    solved = ask(hospital(), request(), approved_epsilon=1.0)
    assert solved == ask(hospital(epsilon=1.0), request())


@pytest.mark.parametrize(
    ("policy", "refused", "allowed"),
    [
        ({"models": ("cnn", "resnet18")}, {"model": "softmax"}, {"model": "cnn"}),
        ({"tasks": ("segmentation",)}, {"task": "classification"}, {"task": "segmentation"}),
        ({"unit": "patient"}, {"unit": "image"}, {"unit": "patient"}),
    ],
)
def test_only_what_the_hospital_lists_is_trained(policy, refused, allowed):
    with pytest.raises(PolicyError) as caught:
        require_allowed(hospital(**policy), replace(request(), **refused))
    assert caught.value.refusal is RefusalCode.POLICY
    require_allowed(hospital(**policy), replace(request(), **allowed))
    require_allowed(hospital(), replace(request(), **refused))
