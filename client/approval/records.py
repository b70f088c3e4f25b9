"""What an approval says, and what waits for one."""

import hashlib
import json
from dataclasses import dataclass

from common.config import PublicPlan
from common.messages import RoundKey
from common.settings import to_nested


@dataclass(frozen=True, kw_only=True)
class PendingPlan:
    """A plan that a server has asked for, as it was asked last."""

    run: str
    digest: str
    plan: PublicPlan
    round_number: int
    reason: str
    """Why it was not trained, in words."""
    asked: float
    """Unix seconds, as all times here."""


@dataclass(frozen=True, kw_only=True)
class Approval:
    """What a person has approved for one run."""

    run: str
    digest: str
    """Of the plan, with the run's id."""
    rounds: int
    """The last round that may be trained."""
    epsilon: float | None
    """What training may cost at most; None for a run that claims no privacy."""
    evaluations: int
    """How often the model may be scored on the validation patients."""
    evaluation_epsilon: float | None
    """What these evaluations together may cost at most; None as above."""
    by: str
    """Operating system's name of the person."""
    at: float


@dataclass(frozen=True, kw_only=True)
class PendingUpdate:
    """A sealed answer that waits to be released; nothing in it was computed from data without noise."""

    run: str
    attempt: int
    round_number: int
    model_hash: str
    purpose: str
    digest: str
    """Hash of everything in the answer."""
    num_bytes: int
    epsilon: float | None
    """What the run has cost with it."""
    asked: float

    @property
    def key(self) -> RoundKey:
        """Of the round that it answers."""
        return RoundKey(
            run_id=self.run,
            attempt=self.attempt,
            round_number=self.round_number,
            model_hash=self.model_hash,
        )


def plan_digest(plan: PublicPlan, run_id: str) -> str:
    """SHA-256 over the run's id and every number of its plan: another plan or run is another digest."""
    content = json.dumps({"run": run_id, "plan": to_nested(plan)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
