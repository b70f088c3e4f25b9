"""How often a run would score its model on this hospital's validation patients, and what that costs them."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from common.config import PublicPlan
from common.errors import Refusal
from common.evaluation import checkpoint_rounds
from common.hospital_config import HospitalConfig
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent


@dataclass(frozen=True, kw_only=True)
class EvaluationOutlook:
    """The evaluations of one run, as far as this hospital takes part in them."""

    at_end: bool
    """The run asks for the final model."""
    after_rounds: tuple[int, ...]
    """Earlier models that the run asks for."""
    number: int
    """How many this hospital would answer at most."""
    counts: tuple[str, ...] = ()
    """Kinds of noised counts that would leave."""
    noise_multiplier: float | None = None
    epsilon_each: float | None = None
    """Cost of one to a validation patient; None where nothing is claimed."""
    epsilon: float | None = None
    """Cost of all of them to a validation patient."""
    none_because: str = ""
    """Why there would be none; empty where there are some."""

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {**asdict(self), "none_because": self.none_because or None, "words": self.in_words()}

    def in_words(self) -> str:
        """One sentence for the person who approves them."""
        if self.number == 0:
            return f"No evaluation: {self.none_because}."
        when = [f"after round {number}" for number in self.after_rounds] + ["at the end"] * self.at_end
        words = (
            f"{self.number} evaluation(s) of the validation patients at most ({', '.join(when)}): noised "
            f"counts ({', '.join(self.counts)})"
        )
        if self.epsilon is None or self.epsilon_each is None:
            return f"{words}, WITHOUT PRIVACY."
        return (
            f"{words}, epsilon {self.epsilon_each:.4g} each and {self.epsilon:.4g} in all to each of these "
            f"patients, noise multiplier {self.noise_multiplier:g}."
        )


def evaluations_of(config: HospitalConfig, plan: PublicPlan) -> EvaluationOutlook:
    """What this run asks and this hospital would answer."""
    from client.evaluation import noise_multiplier_for

    after = checkpoint_rounds(plan.federation.rounds, plan.evaluation.checkpoints)
    asked = len(after) + plan.evaluation.at_end
    release = config.release
    number = min(asked, release.maximum_per_run) if release.metrics else 0
    outlook = EvaluationOutlook(
        at_end=plan.evaluation.at_end, after_rounds=after, number=number, counts=release.metrics
    )
    if number == 0:
        why = "the run asks for none"
        if asked:
            why = "release.maximum-per-run is 0" if release.metrics else "release.metrics is empty"
        return replace(outlook, none_because=why)
    if not plan.federation.private:
        return outlook
    try:
        noise = noise_multiplier_for(config)
    except Refusal as refusal:
        return replace(outlook, number=0, none_because=refusal.what)
    outlook = replace(outlook, noise_multiplier=noise)
    if not plan.claims_privacy:
        return outlook
    once = PrivacyEvent(sampling_rate=1.0, noise_multiplier=noise, steps=1)
    return replace(
        outlook,
        epsilon_each=epsilon([once], delta=config.delta),
        epsilon=epsilon([replace(once, steps=number)], delta=config.delta),
    )
