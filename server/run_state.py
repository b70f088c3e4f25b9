"""Everything that a run is after a round: what a checkpoint holds and a resumed run goes on from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from common.config import FederationConfig
from common.parameters import Parameters, parameters_sha256
from common.settings import Scalar, to_flat
from server.server_optimizer import OptimizerState
from server.totals import HospitalTotals

_FROZEN_SERVER = ("optimizer", "learning-rate", "momentum", "ema-decay", "final-model")
"""Server settings that decide what the model is: changed half-way they would reuse another optimiser's state,
or let the final model be chosen after its scores were seen."""


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
    """See `frozen_settings`."""
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    average: Parameters = field(default_factory=dict)
    """Moving average of the global model; empty when it is off."""
    grid: tuple[int, ...] = ()
    """Exponents of the spacings of the next round's updates (`server.update_grid`); none for float32."""
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

    def let_go(self, successor: Self) -> None:
        """Forget the arrays that `successor` has not, whoever still refers to this state."""
        for mine, its in (
            (self.weights, successor.weights),
            (self.average, successor.average),
            (self.optimizer.first_moment, successor.optimizer.first_moment),
            (self.optimizer.second_moment, successor.optimizer.second_moment),
        ):
            if mine is not its:
                mine.clear()

    @classmethod
    def start(cls, config: FederationConfig, *, run_id: str, weights: Parameters) -> Self:
        """The state before round 1."""
        return cls(
            run_id=run_id,
            round_number=0,
            weights=weights,
            plan=frozen_settings(config),
            average=dict(weights) if config.server.ema_decay else {},
        )


def frozen_settings(config: FederationConfig) -> dict[str, Scalar]:
    """What a run never changes, flat: the public plan, and how the server forms the model."""
    everything = to_flat(config)
    server = {key: everything[key] for key in (f"server.{name}" for name in _FROZEN_SERVER)}
    return to_flat(config.public_plan) | server
