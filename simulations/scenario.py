"""A scenario: what `flower-simulate run` was asked for, and what that means for the data at hand.

A flag left out stays None until the images have been looked at; then `settle` makes the federation's
configuration of it. Later beats earlier: recommended settings, flags, `--set`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from common.errors import ConfigError
from common.models.names import MODELS
from common.settings import Section, parse, with_overrides
from common.task_kinds import CLASSIFICATION, LOSSES

if TYPE_CHECKING:
    from common.config import FederationConfig
    from simulations.partition import PartitionSpec

Engine = Literal["embedded", "ray", "processes"]
DEFAULT_HOSPITALS = 5
SIMULATION_PATIENCE_S = 120.0
DEFAULT_EPSILON = 8.0
"""As of a hospital's policy, which is not imported here: `--help` has no use for it."""


class Scenario(Section):
    """The flags of `flower-simulate run`, by the same names."""

    data: str = ""
    """A `.npz`, an image folder or a CSV; without it chest phantoms are generated."""
    path_column: str = ""
    """CSV: column of the image file."""
    path_root: str = ""
    """CSV: folder that the image paths start from."""
    task: str = ""
    """classification, multi-label or ordinal."""
    label_column: str = ""
    """CSV: column of the label; several: docs/tasks.md."""
    patient_column: str = ""
    """CSV: column of the patient."""
    split_column: str = ""
    """CSV: column of train/val/test."""
    frame_column: str = ""
    """CSV: column of the frame or slice to read."""
    volume_column: str = ""
    """CSV: column of a 4-D file's volume."""
    max_skipped_share: float | None = Field(default=None, ge=0, le=1)
    """Share of unusable images at most; 0.05."""
    image_size: int | None = Field(default=None, ge=8, le=2048)
    """Side of the square image; as in the data for a `.npz`, else 64."""
    channels: Literal[1, 3] | None = None
    """1 grey, 3 colour; as the data show."""
    hospitals: int | None = Field(default=None, ge=1, le=10_000)
    """Hospitals; 1 trains centrally. 5, or as found by column and folders."""
    partition: str = ""
    """iid, dirichlet:ALPHA, size-skew, column:NAME, folders; with +tiny:N."""
    model: str = ""
    """Name from the model registry."""
    rounds: int | None = Field(default=None, ge=1)
    """Rounds of training."""
    local_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps in a hospital per round."""
    epsilon: float | None = Field(default=None, gt=0)
    """Privacy budget of each hospital for this run."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """Delta of that budget; 1 / (10 n) with n the enrolled patients."""
    private: bool = True
    """Differential privacy; false must be asked for."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Fixes partition, split and initial weights."""
    reproducible: bool = False
    """Also takes sampling and noise from the seed; claims no privacy."""
    engine: Engine = "embedded"
    """embedded, ray, or processes."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu or cuda:N."""
    out: str = ""
    """Run folder; a new one under runs/ without it."""
    set: tuple[str, ...] = ()
    """Settings of the federation as section.key=value."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.private and (self.epsilon is not None or self.delta is not None):
            raise ValueError("--private false has no --epsilon and no --delta")
        if self.model and self.model not in MODELS:
            raise ValueError(f"there is no model {self.model!r}; choose one of {', '.join(MODELS)}")
        if self.task and self.task not in LOSSES:
            raise ValueError(f"there is no task {self.task!r}; choose one of {', '.join(LOSSES)}")
        return self

    @property
    def task_name(self) -> str:
        """The task as asked for by flag or setting. Raises ConfigError."""
        return str(self.overrides.get("data", {}).get("task") or self.task or CLASSIFICATION)

    @property
    def generates_images(self) -> bool:
        """Whether the images are phantoms made for this run."""
        return not self.data

    @property
    def partition_spec(self) -> "PartitionSpec":
        """The partition as asked for; phantoms come with their sites. Raises ConfigError."""
        from simulations.partition import parse_partition  # numpy, which `--help` does not need

        return parse_partition(self.partition or ("column:site" if self.generates_images else "iid"))

    @property
    def overrides(self) -> dict[str, Any]:
        """What `--set` says, nested. Raises ConfigError."""
        return with_overrides({}, self.set)


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the images themselves decide."""

    name: str
    """Short name of the data for the report."""
    classes: tuple[str, ...]
    unit: Literal["patient", "image"]
    image_size: int
    channels: int
    units_per_hospital: int
    """Patients to train on in a middling hospital; chooses recommended settings."""


def make_scenario(flags: Mapping[str, Any]) -> Scenario:
    """Check the flags, those that are None left out; raises ConfigError naming the flag."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        scenario = parse(Scenario, given, source="flags")
    except ConfigError as error:
        raise ConfigError(error.what.replace("flags: ", "--", 1), why=error.why, fix=error.fix) from None
    _ = scenario.partition_spec, scenario.overrides
    return scenario


def settle(scenario: Scenario, facts: DataFacts) -> "FederationConfig":
    """The federation's configuration of a scenario on these data, without its run folder."""
    from common.config import FederationConfig
    from simulations.defaults import DEFAULT_MODEL, recommended

    own = scenario.overrides
    model = str(own.get("model", {}).get("name") or scenario.model or DEFAULT_MODEL)
    private = bool(own.get("federation", {}).get("private", scenario.private))
    advised = recommended(
        private=private,
        model=model,
        units_per_hospital=facts.units_per_hospital,
        epsilon=scenario.epsilon or DEFAULT_EPSILON,
    )
    values = with_overrides(_base(scenario, facts, model), advised)
    values = with_overrides(values, _asked(scenario))
    values = with_overrides(values, scenario.set)
    return parse(FederationConfig, values, source="settings")


def _base(scenario: Scenario, facts: DataFacts, model: str) -> dict[str, Any]:
    return {
        "federation": {
            "name": facts.name,
            "seed": scenario.seed,
            "private": scenario.private,
            "reproducible": scenario.reproducible,
        },
        "data": {
            "task": scenario.task_name,
            "classes": list(facts.classes),
            "image-size": facts.image_size,
            "channels": facts.channels,
            "unit": facts.unit,
        },
        "model": {"name": model},
        "training": {"loss": LOSSES.get(scenario.task_name, ("cross-entropy",))[0]},
        # Simulated hospitals are here in seconds or never.
        "server": {"patience-s": SIMULATION_PATIENCE_S},
    }


def _asked(scenario: Scenario) -> Sequence[str]:
    asked = {"federation.rounds": scenario.rounds, "privacy.local-steps": scenario.local_steps}
    return [f"{key}={value}" for key, value in asked.items() if value is not None]
