"""The whole plan: what the hospital would do, what other choices would give, how long it takes here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from client.planning.hospital import PlannedHospital, StepTime, measured_step, num_parameters
from client.planning.outlook import (
    Afforded,
    Outlook,
    afforded,
    is_allowed,
    look_ahead,
    neighbouring_studies,
    other_budgets,
    other_noise,
    run_noise,
    spent_before,
    update_noise,
)
from common.config import PublicPlan
from common.errors import FederationError
from common.hospital_config import HospitalConfig


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Everything that `flower-client plan` found out."""

    hospital: PlannedHospital
    outlook: Outlook
    spent_before: float
    """Epsilon of the worst-off of these patients, before this run."""
    num_parameters: int
    afforded: Afforded | None
    """Rounds of the planned kind; None where nothing private would be trained."""
    step: StepTime | None
    no_step: str
    """Why there is no time; empty where there is."""
    studies: Sequence[Outlook] = ()
    """Other rounds and sampling rates."""
    budgets: Sequence[Outlook] = ()
    noises: Sequence[Afforded] = ()

    def minutes(self, outlook: Outlook) -> float | None:
        """Training time of the rounds that would be trained (all, when refused); None without a measurement.

        One step was measured; another sampling rate is scaled by its expected patients.
        """
        if self.step is None:
            return None
        knobs = outlook.study.privacy
        scale = knobs.sampling_rate / self.hospital.study.privacy.sampling_rate
        rounds = outlook.rounds or outlook.study.federation.rounds
        return self.step.seconds * scale * knobs.local_steps * rounds / 60

    def as_json(self) -> dict[str, Any]:
        """The same for programs; keys never change meaning."""
        hospital = self.hospital
        return {
            "hospital": hospital.config.hospital.name,
            "enrolled_patients": hospital.config.hospital.enrolled_patients,
            "unit": hospital.unit,
            "private": hospital.study.claims_privacy,
            "takes_part": not self.outlook.refusal,
            "study_from": hospital.study_from,
            "ledger": hospital.ledger,
            "model": {"name": hospital.study.model.name, "parameters": self.num_parameters},
            "mode": hospital.config.policy.mode,
            "composition": hospital.config.policy.composition,
            "run_epsilon": hospital.config.policy.run_epsilon,
            "spent_before": self.spent_before,
            "plan": self._outlook_json(self.outlook),
            "affordable": self._afforded_json(self.afforded) if self.afforded else None,
            "step": {"seconds": self.step.seconds, "device": self.step.device} if self.step else None,
            "other_studies": [self._outlook_json(other) for other in self.studies],
            "other_budgets": [self._outlook_json(other) for other in self.budgets],
            "other_noise": [self._afforded_json(found) for found in self.noises],
        }

    def _outlook_json(self, outlook: Outlook) -> dict[str, Any]:
        federation, plan, rounds = outlook.study.federation, outlook.plan, outlook.rounds
        return {
            "rounds": federation.rounds,
            "local_steps": outlook.study.privacy.local_steps,
            "sampling_rate": outlook.study.privacy.sampling_rate,
            "l2_clip_norm": outlook.study.privacy.l2_clip_norm,
            "budget": outlook.budget,
            "delta": outlook.delta,
            "refusal": outlook.refusal or None,
            "rounds_trained": rounds,
            "noise_multiplier": plan.noise_multiplier if plan else None,
            "plan_digest": plan.digest() if plan else None,
            "epsilon": outlook.epsilon,
            "epsilon_after": outlook.epsilon_after,
            "budget_left": None if outlook.epsilon_after is None else outlook.budget - outlook.epsilon_after,
            "noise_in_an_update": update_noise(plan, self.num_parameters) if plan else None,
            "noise_over_the_run": run_noise(plan, self.num_parameters, rounds=rounds) if plan else None,
            "minutes": self.minutes(outlook),
        }

    def _afforded_json(self, found: Afforded) -> dict[str, Any]:
        return {
            "noise_multiplier": found.plan.noise_multiplier,
            "rounds": found.rounds,
            "is_policy_ceiling": found.is_ceiling,
            "noise_in_an_update": update_noise(found.plan, self.num_parameters),
        }


def make_report(
    hospital: PlannedHospital, *, timing: bool = True, say: Callable[[str], None] = lambda _: None
) -> PlanReport:
    """Compute the plan itself; `timing` measures a step. Raises ModelError for an unknown model."""
    config, study, histories, unit = hospital.config, hospital.study, hospital.histories, hospital.unit
    weights = num_parameters(study)
    say("the plan")
    outlook = look_ahead(config, study, histories, unit=unit)
    fit = None
    if outlook.plan is not None and study.claims_privacy:
        noise = outlook.plan.noise_multiplier
        fit = afforded(config, study, histories, noise_multiplier=noise, unit=unit)
    step, no_step = None, "not measured (--without-timing)"
    if timing:
        say("the time of a private step")
        try:
            step, no_step = measured_step(config, study), ""
        except FederationError as error:
            no_step = f"not measured, {error.what}: {error.why}"
    return PlanReport(
        hospital=hospital,
        outlook=outlook,
        spent_before=spent_before(config, histories),
        num_parameters=weights,
        afforded=fit,
        step=step,
        no_step=no_step,
    )


def with_choices(report: PlanReport, *, say: Callable[[str], None] = lambda _: None) -> PlanReport:
    """The report with what other choices would give; seconds for each line where noise is solved for."""
    hospital = report.hospital
    config, study, histories, unit = hospital.config, hospital.study, hospital.histories, hospital.unit
    if not study.claims_privacy:
        return report

    def ahead(other: HospitalConfig, run: PublicPlan) -> Outlook:
        rate = run.privacy.sampling_rate
        say(f"{run.federation.rounds} rounds, sampling rate {rate:g}, budget {other.policy.epsilon:g}")
        return look_ahead(other, run, histories, unit=unit)

    def rounds_with(noise: float) -> Afforded:
        say(f"how many rounds fit with noise multiplier {noise:g}")
        return afforded(config, study, histories, noise_multiplier=noise, unit=unit)

    tried = other_noise(config, study, report.outlook.plan) if is_allowed(config, study, unit=unit) else ()
    return replace(
        report,
        studies=[ahead(config, run) for run in neighbouring_studies(study)],
        budgets=[ahead(other, study) for other in other_budgets(config)],
        noises=[rounds_with(noise) for noise in tried],
    )
