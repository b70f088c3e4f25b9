"""What a run would do here: the numbers behind `flower-client plan`.

Everything comes from the objects that training uses (`client.policy`, `PrivacyPlan`, the accountant), so that
what is planned and what is trained cannot disagree. Pure functions: nothing is charged and nothing is read.
Histories that come from a ledger are private, and so is whatever is computed from them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from client.limits import Behind, Histories, affordable_rounds
from client.policy import (
    TrainingRequest,
    agree,
    planned,
    require_allowed,
    require_patients,
)
from common.config import PublicPlan
from common.errors import PrivacyError, Refusal
from common.hospital_config import HospitalConfig
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent, PrivacyPlan, Unit

TRIED_EPSILONS = (1.0, 3.0, 8.0)
_TRIED_NOISE = (0.5, 0.75, 1.5, 2.0, 3.0)
"""Multiples of the planned noise multiplier."""
_TRIED_WITHOUT_PLAN = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What a run that goes on has done here."""

    rounds: int = 0
    """The last round that was charged."""
    events: Sequence[PrivacyEvent] = ()
    noise_multiplier: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the hospital would do in one new run."""

    study: PublicPlan
    budget: float
    """Epsilon that the worst-off patient may reach."""
    delta: float
    plan: PrivacyPlan | None = None
    """One round; None where nothing private would be trained."""
    rounds: int = 0
    """Rounds that would be trained, from the first on; then the hospital leaves with `budget-spent`."""
    epsilon: float | None = None
    """Cost of these rounds, with what this run has charged already; None where nothing is claimed."""
    epsilon_after: float | None = None
    """What the worst-off of these patients would have spent afterwards, over all runs."""
    refusal: str = ""
    """Why the hospital would refuse; empty where it takes part."""
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Afforded:
    """How many rounds of one step size and noise fit what is left."""

    plan: PrivacyPlan
    rounds: int
    is_ceiling: bool
    """The policy ends it (maximum-rounds, maximum-steps), not the budget."""


def look_ahead(
    config: HospitalConfig,
    study: PublicPlan,
    histories: Histories,
    *,
    unit: Unit = "patient",
    begun: Begun | None = None,
) -> Outlook:
    """What the hospital would do in a run of `study`, a new one where nothing has `begun`.

    `histories` as of `Ledger.histories`; what has begun is part of them.
    """
    begun = begun or Begun()
    nothing = Outlook(study=study, budget=config.policy.epsilon, delta=config.delta)
    request = TrainingRequest.of(
        study, round_number=min(begun.rounds + 1, study.federation.rounds), unit=unit
    )
    behind = Behind(histories=histories, run_events=begun.events)
    try:
        require_patients(study, unit)
        plan = agree(config, request, behind, earlier_noise_multiplier=begun.noise_multiplier)
    except (PrivacyError, Refusal) as error:
        words = f"{error.what}: {error.why}" if error.why else error.what
        return replace(nothing, refusal=words, fix=error.fix)
    if plan is None or not study.claims_privacy:
        return replace(nothing, plan=plan, rounds=request.rounds)
    rounds = affordable_rounds(_at_most(config, request.remaining_rounds), plan, behind)
    run = replace(plan.event(), steps=plan.steps * rounds)
    return replace(
        nothing,
        plan=plan,
        rounds=begun.rounds + rounds,
        epsilon=epsilon([*begun.events, run], delta=config.delta),
        epsilon_after=max(epsilon([*history, run], delta=config.delta) for history in histories or [()]),
    )


def is_allowed(config: HospitalConfig, study: PublicPlan, *, unit: Unit = "patient") -> bool:
    """Whether budget and noise alone decide: nothing else in policy or data forbids the study."""
    try:
        require_patients(study, unit)
        require_allowed(config, TrainingRequest.of(study, round_number=1, unit=unit))
    except (PrivacyError, Refusal):
        return False
    return True


def afforded(
    config: HospitalConfig,
    study: PublicPlan,
    histories: Histories,
    *,
    noise_multiplier: float,
    unit: Unit = "patient",
) -> Afforded:
    """How many rounds with this noise fit what is left, up to the policy's ceilings for one run."""
    request = TrainingRequest.of(study, round_number=1, unit=unit)
    plan = planned(config, request, noise_multiplier)
    most = min(config.policy.maximum_rounds, config.policy.maximum_steps // plan.steps)
    rounds = affordable_rounds(_at_most(config, most), plan, Behind(histories=histories)) if most else 0
    return Afforded(plan=plan, rounds=rounds, is_ceiling=rounds == most)


def spent_before(config: HospitalConfig, histories: Histories) -> float:
    """What the worst-off of these patients has spent, over all runs."""
    return max(epsilon(history, delta=config.delta) for history in histories or [()])


def update_noise(plan: PrivacyPlan, num_parameters: int) -> float:
    """Length of the noise in one round's update over the longest mean update that the clip allows.

    A step's mean gradient has length C at most, and noise of sigma C / (q n) in each of d directions, so root
    mean square sigma sqrt(d) / (q n) over C; `steps` of them add up in length, their noise as a square root.
    For local SGD without momentum. Example: sigma 1, q 0.1, n 1000, one step, d 10,000: 1.0.
    """
    return plan.noise_multiplier * math.sqrt(num_parameters / plan.steps) / plan.expected_batch_size


def run_noise(plan: PrivacyPlan, num_parameters: int, *, rounds: int) -> float:
    """`update_noise` of the mean of all `rounds` updates: what rounds and sampling rates differ in."""
    return update_noise(plan, num_parameters) / math.sqrt(rounds)


def neighbouring_studies(study: PublicPlan) -> Iterator[PublicPlan]:
    """`study` itself and with about half and twice its rounds and sampling rate, where they exist."""
    rounds, rate = study.federation.rounds, study.privacy.sampling_rate
    lower = {rate / 4, rate / 2} if rate == 1 else {rate / 2}
    for tried_rounds in sorted({max(1, rounds // 2), rounds, min(2 * rounds, 100_000)}):
        for tried_rate in sorted({*lower, rate, min(1.0, 2 * rate)}):
            yield study.model_copy(
                update={
                    "federation": study.federation.model_copy(update={"rounds": tried_rounds}),
                    "privacy": study.privacy.model_copy(update={"sampling_rate": tried_rate}),
                }
            )


def other_budgets(config: HospitalConfig) -> Iterator[HospitalConfig]:
    """The hospital with noise solved for a budget of 1, 3, 8 and its own."""
    for budget in sorted({*TRIED_EPSILONS, config.policy.epsilon}):
        yield _with_policy(config, mode="solve", epsilon=budget)


def other_noise(config: HospitalConfig, study: PublicPlan, plan: PrivacyPlan | None) -> Sequence[float]:
    """Noise multipliers around the planned one that policy and study allow, other ones with three digits."""
    tried = [factor * plan.noise_multiplier for factor in _TRIED_NOISE] if plan else _TRIED_WITHOUT_PLAN
    values = {float(f"{noise:.3g}") for noise in tried} | ({plan.noise_multiplier} if plan else set())
    floor = max(config.policy.minimum_noise_multiplier, study.privacy.minimum_noise_multiplier)
    return sorted(noise for noise in values if floor <= noise <= config.policy.maximum_noise_multiplier)


def _at_most(config: HospitalConfig, rounds: int) -> HospitalConfig:
    return _with_policy(config, maximum_rounds=rounds)


def _with_policy(config: HospitalConfig, **changes: object) -> HospitalConfig:
    return config.model_copy(update={"policy": config.policy.model_copy(update=changes)})
