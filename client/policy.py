"""The hospital's policy: what a server may ask, and how much noise the hospital adds.

A server names rounds, steps, clip and sampling rate; the hospital decides its noise and whether it takes
part. What a server asks can only make training more private. Refusals travel as a code, their words stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from client.budget_words import budget_error
from common.config import PrivacyKnobs, PublicPlan
from common.errors import BudgetError, PolicyError, Refusal, RefusalCode
from common.hospital_config import HospitalConfig
from common.privacy.accountant import affordable_steps, fits, running_epsilon, solve_noise_multiplier
from common.privacy.plan import PrivacyEvent, PrivacyPlan, Unit

Histories = Sequence[Sequence[PrivacyEvent]]


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What a server asks of a hospital in one round."""

    rounds: int
    """Rounds of the whole run."""
    round_number: int
    """The round asked for, 1-based."""
    knobs: PrivacyKnobs
    private: bool
    reproducible: bool
    """Sampling and noise come from a seed that others know: the run claims no privacy."""
    unit: Unit
    """Who is protected with the hospital's data: images where it knows no patients."""
    image_size: int
    classes: tuple[str, ...]

    @classmethod
    def of(cls, plan: PublicPlan, *, round_number: int, unit: Unit) -> Self:
        """The request that a public plan makes in round `round_number`."""
        return cls(
            rounds=plan.federation.rounds,
            round_number=round_number,
            knobs=plan.privacy,
            private=plan.federation.private,
            reproducible=plan.federation.reproducible,
            unit=unit,
            image_size=plan.data.image_size,
            classes=plan.data.classes,
        )

    @property
    def remaining_rounds(self) -> int:
        """Rounds from this one to the last."""
        return self.rounds - self.round_number + 1


def agree(
    config: HospitalConfig,
    request: TrainingRequest,
    *,
    histories: Histories,
    earlier_noise_multiplier: float | None = None,
) -> PrivacyPlan | None:
    """The plan of this round, or None for training without privacy that the policy allows.

    `histories` are what the patients have behind them (`Ledger.histories`), `earlier_noise_multiplier` is the
    noise of this run's earlier rounds, which stays. Raises PolicyError, BudgetError, Refusal(NOT_PRIVATE).
    """
    require_allowed(config, request)
    if not request.private:
        return None
    noise_multiplier = _noise_multiplier(config, request, histories, earlier_noise_multiplier)
    plan = planned(config, request, noise_multiplier)
    _require_affordable(config, plan, histories)
    return plan


def planned(config: HospitalConfig, request: TrainingRequest, noise_multiplier: float) -> PrivacyPlan:
    """The plan of one round with this noise; nothing is checked against the policy."""
    return PrivacyPlan(
        sampling_rate=request.knobs.sampling_rate,
        l2_clip_norm=request.knobs.l2_clip_norm,
        noise_multiplier=noise_multiplier,
        steps=request.knobs.local_steps,
        enrolled_units=config.hospital.enrolled_patients,
        max_rows_per_unit=request.knobs.max_images_per_patient,
        unit=request.unit,
    )


def affordable_rounds(config: HospitalConfig, plan: PrivacyPlan, histories: Histories) -> int:
    """How many more rounds of `plan` the budget allows, at most the policy's ceiling."""
    most = config.policy.maximum_rounds
    steps = affordable_steps(
        histories=histories,
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.noise_multiplier,
        epsilon=config.policy.epsilon,
        delta=config.delta,
        most=most * plan.steps,
    )
    return steps // plan.steps


def require_allowed(config: HospitalConfig, request: TrainingRequest) -> None:
    """Refuse what the policy never allows, before any image is touched: only public numbers decide.

    Raises PolicyError, or Refusal(NOT_PRIVATE). Whoever sees the answer learns nothing about patients.
    """
    policy, knobs = config.policy, request.knobs
    if not (request.private and not request.reproducible) and not policy.allow_non_private:
        kind = "without privacy" if not request.private else "with noise that others can recompute"
        raise Refusal(
            RefusalCode.NOT_PRIVATE,
            f"the server asks for training {kind}",
            why="policy.allow-non-private is false",
            fix="take part in private runs, or set policy.allow-non-private = true for data that need none",
        )
    enrolled = config.hospital.enrolled_patients
    if enrolled < policy.minimum_patients:
        raise PolicyError(
            f"{enrolled} enrolled patients, and policy.minimum-patients is {policy.minimum_patients}",
            fix="take part with more patients, or lower that setting",
        )
    if not 1 <= request.round_number <= request.rounds:
        raise PolicyError(f"the server asks for round {request.round_number} of {request.rounds}")
    ceilings = {
        "maximum-rounds": (request.rounds, policy.maximum_rounds),
        "maximum-local-steps": (knobs.local_steps, policy.maximum_local_steps),
        "maximum-steps": (request.rounds * knobs.local_steps, policy.maximum_steps),
        "maximum-clip-norm": (knobs.l2_clip_norm, policy.maximum_clip_norm),
        "maximum-image-size": (request.image_size, policy.maximum_image_size),
    }
    for setting, (asked, ceiling) in ceilings.items():
        if asked > ceiling:
            raise PolicyError(
                f"the server asks for {asked:g}, above policy.{setting} = {ceiling:g}",
                fix="agree on other settings with the federation, or raise the ceiling",
            )
    if config.data.classes and request.classes != config.data.classes:
        raise PolicyError(
            "the run has other classes than this hospital's data.classes",
            why="a server that may choose them could ask about labels one by one",
            fix="agree on the classes with the federation and write them into data.classes",
        )


def require_patients(plan: PublicPlan, unit: Unit) -> None:
    """Refuse a run that protects patients where the images, with their own `unit`, name none."""
    if plan.data.unit == "patient" and unit == "image":
        raise Refusal(
            RefusalCode.DATA,
            "the run protects patients, and these images name none",
            fix="name the patient column in hospital.toml, or take part in a run with unit = 'image'",
        )


def _noise_multiplier(
    config: HospitalConfig, request: TrainingRequest, histories: Histories, earlier: float | None
) -> float:
    policy, knobs = config.policy, request.knobs
    floor = max(policy.minimum_noise_multiplier, knobs.minimum_noise_multiplier)
    if floor > policy.maximum_noise_multiplier:
        raise PolicyError(
            f"the server asks for a noise multiplier of at least {floor:g}, above the policy's ceiling",
            why=f"policy.maximum-noise-multiplier = {policy.maximum_noise_multiplier:g}",
            fix="raise the ceiling, or leave this run",
        )
    if policy.mode == "fixed" and policy.noise_multiplier is not None:
        chosen = max(policy.noise_multiplier, floor)
    elif earlier is not None:
        chosen = max(earlier, floor)
    else:
        chosen = _solved(config, request, histories, floor)
    if chosen > policy.maximum_noise_multiplier:
        raise PolicyError(
            f"noise multiplier {chosen:g} is above policy.maximum-noise-multiplier",
            why=f"the ceiling is {policy.maximum_noise_multiplier:g}: above it only noise is trained",
            fix="train fewer rounds or steps, lower the sampling rate, or raise budget or ceiling",
        )
    return chosen


def _solved(config: HospitalConfig, request: TrainingRequest, histories: Histories, floor: float) -> float:
    """Noise with which all rounds from here on fit; PolicyError where only the ceiling forbids it."""
    policy = config.policy
    try:
        return solve_noise_multiplier(
            histories=histories,
            sampling_rate=request.knobs.sampling_rate,
            steps=request.remaining_rounds * request.knobs.local_steps,
            epsilon=policy.epsilon,
            delta=config.delta,
            minimum=floor,
            maximum=policy.maximum_noise_multiplier,
        )
    except BudgetError as error:
        if any(event.steps for history in histories for event in history):
            raise _budget_spent(config, request, histories) from None
        raise PolicyError(
            "the plan needs more noise than policy.maximum-noise-multiplier allows",
            why=f"{error.what}; {error.why}",
            fix=error.fix,
        ) from None


def _budget_spent(config: HospitalConfig, request: TrainingRequest, histories: Histories) -> BudgetError:
    """No noise that the policy takes makes the rest of the run fit."""
    policy = config.policy
    steps = request.remaining_rounds * request.knobs.local_steps
    return budget_error(
        f"the rounds from {request.round_number} to {request.rounds} do not fit the budget of "
        f"epsilon {policy.epsilon:g}, not even with policy.maximum-noise-multiplier",
        history=max(histories, key=lambda history: running_epsilon(history, delta=config.delta)),
        event=PrivacyEvent(
            sampling_rate=request.knobs.sampling_rate,
            noise_multiplier=policy.maximum_noise_multiplier,
            steps=steps,
        ),
        limit=policy.epsilon,
        delta=config.delta,
    )


def _require_affordable(config: HospitalConfig, plan: PrivacyPlan, histories: Histories) -> None:
    """One more round must fit every patient's budget."""
    for history in histories or [()]:
        if not fits([*history, plan.event()], epsilon=config.policy.epsilon, delta=config.delta):
            raise budget_error(
                f"one more round does not fit the budget of epsilon {config.policy.epsilon:g}",
                history=history,
                event=plan.event(),
                limit=config.policy.epsilon,
                delta=config.delta,
            )
