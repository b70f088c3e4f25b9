"""The hospital's policy: what a server may ask, and how much noise the hospital adds.

A server names rounds, steps, clip and sampling rate; the hospital decides its noise and whether it takes
part. What a server asks can only make training more private. Refusals travel as a code, their words stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from client.limits import Behind, Limit, first_broken, limit_error, limits_of, solved_noise
from common.config import PrivacyKnobs, PublicPlan
from common.errors import BudgetError, PolicyError, Refusal, RefusalCode, printable
from common.hospital_config import HospitalConfig, PolicyConfig
from common.privacy.plan import PrivacyEvent, PrivacyPlan, Unit


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
    model: str
    """Name in the model registry."""
    task: str

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
            model=plan.model.name,
            task=plan.data.task,
        )

    @property
    def remaining_rounds(self) -> int:
        """Rounds from this one to the last."""
        return self.rounds - self.round_number + 1


def agree(
    config: HospitalConfig,
    request: TrainingRequest,
    behind: Behind,
    *,
    earlier_noise_multiplier: float | None = None,
    approved_epsilon: float | None = None,
) -> PrivacyPlan | None:
    """The plan of this round, or None for training without privacy that the policy allows.

    `behind` is what patients and run have behind them, `earlier_noise_multiplier` the noise of this run's
    first charge, which stays in both modes (a policy changed since counts from the next run),
    `approved_epsilon` what a person allows the run to cost, if one was asked.
    Raises PolicyError, BudgetError, Refusal(NOT_PRIVATE), Refusal(APPROVAL).
    """
    require_allowed(config, request)
    if not request.private:
        return None
    limits = list(limits_of(config, behind, approved_epsilon=approved_epsilon))
    noise_multiplier = _noise_multiplier(config, request, limits, earlier_noise_multiplier)
    plan = planned(config, request, noise_multiplier)
    if (broken := first_broken(limits, plan.event(), delta=config.delta)) is not None:
        what = f"one more round does not fit the budget of epsilon {broken.epsilon:g}"
        raise limit_error(broken, what, plan.event(), delta=config.delta)
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
        clipping=request.knobs.clipping,
    )


def require_allowed(config: HospitalConfig, request: TrainingRequest) -> None:
    """Refuse what the policy never allows, before any image is touched: only public numbers decide.

    Raises PolicyError, or Refusal(NOT_PRIVATE). Whoever sees the answer learns nothing about patients.
    """
    policy = config.policy
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
    _require_below_ceilings(policy, request)
    _require_listed(config, request)


def _require_below_ceilings(policy: PolicyConfig, request: TrainingRequest) -> None:
    knobs = request.knobs
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


def _require_listed(config: HospitalConfig, request: TrainingRequest) -> None:
    """Only the models, tasks, classes and units of protection that this hospital names."""
    policy = config.policy
    lists = {"models": (request.model, policy.models), "tasks": (request.task, policy.tasks)}
    for setting, (asked, allowed) in lists.items():
        if allowed and asked not in allowed:
            raise PolicyError(
                f"the run trains {printable(asked)}, which is not among policy.{setting}",
                why=f"allowed here: {', '.join(allowed)}",
                fix="agree on another one with the federation, or add it to that list",
            )
    if policy.unit == "patient" and request.unit == "image":
        raise PolicyError(
            "single images would be protected, not patients",
            why="policy.unit is 'patient', and a patient with ten images is protected ten times less",
            fix="name the patient column in hospital.toml, or take part in runs that protect patients",
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
    config: HospitalConfig, request: TrainingRequest, limits: Sequence[Limit], earlier: float | None
) -> float:
    policy, knobs = config.policy, request.knobs
    floor = max(policy.minimum_noise_multiplier, knobs.minimum_noise_multiplier)
    if floor > policy.maximum_noise_multiplier:
        raise PolicyError(
            f"the server asks for a noise multiplier of at least {floor:g}, above the policy's ceiling",
            why=f"policy.maximum-noise-multiplier = {policy.maximum_noise_multiplier:g}",
            fix="raise the ceiling, or leave this run",
        )
    if earlier is not None:
        _require_enough_noise(policy, knobs, earlier)
        chosen = earlier
    elif policy.mode == "fixed" and policy.noise_multiplier is not None:
        chosen = max(policy.noise_multiplier, floor)
    else:
        chosen = _solved(config, request, limits, floor)
    if chosen > policy.maximum_noise_multiplier:
        raise PolicyError(
            f"noise multiplier {chosen:g} is above policy.maximum-noise-multiplier",
            why=f"the ceiling is {policy.maximum_noise_multiplier:g}: above it only noise is trained",
            fix="train fewer rounds or steps, lower the sampling rate, or raise budget or ceiling",
        )
    return chosen


def _require_enough_noise(policy: PolicyConfig, knobs: PrivacyKnobs, noise_multiplier: float) -> None:
    """A run keeps its noise; where somebody wants more in the midst of it, it ends here."""
    fixed = policy.noise_multiplier if policy.mode == "fixed" and policy.noise_multiplier is not None else 0.0
    asked = {
        "policy.minimum-noise-multiplier": policy.minimum_noise_multiplier,
        "policy.noise-multiplier": fixed,
        "the server's minimum-noise-multiplier": knobs.minimum_noise_multiplier,
    }
    setting, least = max(asked.items(), key=lambda item: item[1])
    if least > noise_multiplier:
        raise PolicyError(
            f"this run has had a noise multiplier of {noise_multiplier:g} since its first round, and "
            f"{setting} is now {least:g}",
            why="the noise of a run that has begun stays: a changed setting counts from the next run",
            fix=f"leave this run, or set {setting} back to what it was",
        )


def _solved(config: HospitalConfig, request: TrainingRequest, limits: Sequence[Limit], floor: float) -> float:
    """Noise with which all rounds from here on fit; PolicyError where only the ceiling forbids it."""
    ceiling, steps = (
        config.policy.maximum_noise_multiplier,
        request.remaining_rounds * request.knobs.local_steps,
    )
    rate = request.knobs.sampling_rate
    try:
        return solved_noise(
            limits, sampling_rate=rate, steps=steps, delta=config.delta, minimum=floor, maximum=ceiling
        )
    except BudgetError as error:
        most = PrivacyEvent(sampling_rate=rate, noise_multiplier=ceiling, steps=steps)
        broken = first_broken(limits, most, delta=config.delta)
        if broken is not None and any(event.steps for history in broken.histories for event in history):
            what = (
                f"the rounds from {request.round_number} to {request.rounds} do not fit the budget of "
                f"epsilon {broken.epsilon:g}, not even with policy.maximum-noise-multiplier"
            )
            raise limit_error(broken, what, most, delta=config.delta) from None
        raise PolicyError(
            "the plan needs more noise than policy.maximum-noise-multiplier allows",
            why=f"{error.what}; {error.why}",
            fix=error.fix,
        ) from None
