"""Everything that a run is after a round: what a checkpoint holds and a resumed run goes on from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

from common import messages
from common.config import FederationConfig
from common.parameters import Parameters, parameters_sha256
from common.settings import Scalar, to_flat
from server.server_optimizer import OptimizerState


@dataclass(frozen=True, kw_only=True)
class HospitalTotals:
    """What the server knows of a hospital: its public count and the scalars of its aggregated answers."""

    enrolled_patients: int
    rounds: int = 0
    """Rounds in which its update was aggregated."""
    steps: int = 0
    """Training steps in those rounds."""
    epsilon: float | None = None
    """Spent after its last aggregated round, as its ledger says."""
    delta: float | None = None
    noise_multiplier: float | None = None

    def after(self, metrics: Mapping[str, float], *, planned_steps: int) -> Self:
        """The totals with one more aggregated answer; without privacy hospitals do not repeat the plan."""
        return replace(
            self,
            rounds=self.rounds + 1,
            steps=self.steps + int(metrics.get(messages.STEPS, planned_steps)),
            epsilon=metrics.get(messages.EPSILON),
            delta=metrics.get(messages.DELTA),
            noise_multiplier=metrics.get(messages.NOISE_MULTIPLIER),
        )


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run after `round_number` rounds."""

    run_id: str
    """The federation's own id; new for every run, kept by a resumed one."""
    round_number: int
    """Rounds done; 0 at the start."""
    weights: Parameters
    """Global model."""
    plan: Mapping[str, Scalar]
    """The public plan, flat; a run never changes it."""
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    average: Parameters = field(default_factory=dict)
    """Moving average of the global model; empty when it is off."""
    hospitals: Mapping[str, HospitalTotals] = field(default_factory=dict)
    wall_s: float = 0.0
    """Seconds of server time up to here, over all sessions."""

    @cached_property
    def model_sha256(self) -> str:
        """Hash of the global weights: part of the next round's key."""
        return parameters_sha256(self.weights)

    def result(self, config: FederationConfig) -> Parameters:
        """The model that the run would hand out now; never chosen by looking at patients."""
        return self.average or self.weights if config.server.final_model == "ema" else self.weights

    @classmethod
    def start(cls, config: FederationConfig, *, run_id: str, weights: Parameters) -> Self:
        """The state before round 1."""
        return cls(
            run_id=run_id,
            round_number=0,
            weights=weights,
            plan=to_flat(config.public_plan),
            average=dict(weights) if config.server.ema_decay else {},
        )
