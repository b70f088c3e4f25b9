"""What a round may cost: the budget over everything, and what one run may spend of it.

A limit is a number and the lists of events that count against it. Every limit must hold for every one of its
lists; what is solved, planned and refused goes through the same limits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from client.budget_words import budget_error
from client.ledger.records import Composition
from common.errors import BudgetError, FederationError, Refusal, RefusalCode
from common.hospital_config import HospitalConfig
from common.privacy.accountant import fits, running_epsilon
from common.privacy.calibration import affordable_steps, solve_noise_multiplier
from common.privacy.plan import PrivacyEvent, PrivacyPlan

Histories = Sequence[Sequence[PrivacyEvent]]
_BUDGET = "policy.epsilon"


@dataclass(frozen=True, kw_only=True)
class Behind:
    """What has been done before this round."""

    histories: Histories = ((),)
    """What the patients have behind them, over all runs (`Ledger.histories`); private."""
    run_events: Sequence[PrivacyEvent] = ()
    """What this run has charged for training so far."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """`epsilon` that none of `histories` may go above."""

    epsilon: float
    histories: Histories
    setting: str
    """Who sets it: `policy.epsilon`, `policy.run-epsilon`, or a person's approval."""
    composition: Composition = "patient"
    """How the histories were composed."""

    def allows(self, event: PrivacyEvent, *, delta: float) -> bool:
        """Whether `event` fits behind every list."""
        return all(
            fits([*history, event], epsilon=self.epsilon, delta=delta) for history in self.histories or [()]
        )

    def worst(self, *, delta: float) -> Sequence[PrivacyEvent]:
        """The list that has cost the most."""
        return max(self.histories or [()], key=lambda history: running_epsilon(history, delta=delta))


def limits_of(
    config: HospitalConfig, behind: Behind, *, approved_epsilon: float | None = None
) -> Iterator[Limit]:
    """Every limit that holds here; the tightest words come first where several forbid the same."""
    policy, run = config.policy, [behind.run_events]
    yield Limit(
        epsilon=policy.epsilon,
        histories=behind.histories,
        setting=_BUDGET,
        composition=policy.composition,
    )
    if policy.run_epsilon is not None:
        yield Limit(epsilon=policy.run_epsilon, histories=run, setting="policy.run-epsilon")
    if approved_epsilon is not None:
        yield Limit(epsilon=approved_epsilon, histories=run, setting="approval")


def solved_noise(
    limits: Sequence[Limit],
    *,
    sampling_rate: float,
    steps: int,
    delta: float,
    minimum: float,
    maximum: float,
) -> float:
    """Smallest noise multiplier with which `steps` fit all limits. Raises BudgetError when none does."""
    noise = minimum
    for limit in sorted(limits, key=lambda limit: limit.epsilon):
        event = PrivacyEvent(sampling_rate=sampling_rate, noise_multiplier=noise, steps=steps)
        if noise > minimum and limit.allows(event, delta=delta):
            continue  # what a tighter limit asked for is enough
        noise = solve_noise_multiplier(
            histories=limit.histories,
            sampling_rate=sampling_rate,
            steps=steps,
            epsilon=limit.epsilon,
            delta=delta,
            minimum=noise,
            maximum=maximum,
        )
    return noise


def affordable_rounds(config: HospitalConfig, plan: PrivacyPlan, behind: Behind) -> int:
    """How many more rounds of `plan` every limit allows, at most the policy's ceiling."""
    most = config.policy.maximum_rounds * plan.steps
    for limit in limits_of(config, behind):
        most = affordable_steps(
            histories=limit.histories,
            sampling_rate=plan.sampling_rate,
            noise_multiplier=plan.noise_multiplier,
            epsilon=limit.epsilon,
            delta=config.delta,
            most=most,
        )
        if most == 0:
            break
    return most // plan.steps


def first_broken(limits: Sequence[Limit], event: PrivacyEvent, *, delta: float) -> Limit | None:
    """The first limit that `event` would break, None when it fits all."""
    return next((limit for limit in limits if not limit.allows(event, delta=delta)), None)


def limit_error(limit: Limit, what: str, event: PrivacyEvent, *, delta: float) -> FederationError:
    """Why `what` is refused: a BudgetError, or Refusal(APPROVAL) where a person can allow more."""
    history = limit.worst(delta=delta)
    if limit.setting == _BUDGET:
        return budget_error(
            what,
            history=history,
            event=event,
            limit=limit.epsilon,
            delta=delta,
            composition=limit.composition,
        )
    used = running_epsilon(history, delta=delta)
    with_it = running_epsilon([*history, event], delta=delta)
    why = (
        f"used: epsilon {used:.4g} of the {limit.epsilon:.4g} that this run may cost ({limit.setting}); "
        f"asked: {event.steps} step(s) at noise multiplier {event.noise_multiplier:g}, which would make it "
        f"{with_it:.4g}"
    )
    if limit.setting == "approval":
        return Refusal(RefusalCode.APPROVAL, what, why=why, fix="flower-client approve allows more")
    return BudgetError(
        what, why=why, fix="other runs go on; a larger policy.run-epsilon is a decision of yours"
    )
