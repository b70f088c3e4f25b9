"""What only the server needs of a federation's configuration; no hospital sees it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from common.settings import Section

MOST_HOSPITALS = 2**20
"""The sum of so many updates in whole numbers is still exact (`common.quantisation`)."""


class ServerSection(Section):
    """How the server closes rounds and forms the next model."""

    optimizer: Literal["plain", "momentum", "adam"] = "plain"
    """Server optimiser applied to the weighted mean of the updates."""
    learning_rate: float = Field(default=1.0, gt=0)
    """Server step size; 1.0 with `plain` is FedAvg."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of `momentum`, first moment of `adam`."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the moving average of the global model; 0 switches it off."""
    final_model: Literal["last", "ema"] = "last"
    """Which model is the result. Never chosen by looking at patients."""
    weighting: Literal["patients", "squares"] = "patients"
    """Weight of an update: the enrolled count (every patient counts alike), or its square, which leaves least
    noise in the mean where hospitals differ in size; that needs `wire.bits = 32`."""
    quorum: int = Field(default=1, ge=1, le=MOST_HOSPITALS)
    """Updates that a round needs to count."""
    patience_s: float = Field(default=600.0, gt=0)
    """Seconds to wait for the quorum before the run ends as `quorum-lost`."""
    deadline_s: float = Field(default=3600.0, gt=0)
    """Seconds a hospital has for one round."""
    keep_checkpoints: int = Field(default=3, ge=2, le=4)
    """Newest checkpoints that are kept; hospitals keep their sealed answers of four rounds."""
    update_norm_factor: float = Field(default=10.0, gt=1)
    """An update whose norm exceeds the plan's bound by this factor is refused."""
    maximum_noise_multiplier: float = Field(default=1000.0, gt=0)
    """An update that states more noise is refused: the bound on its norm grows with the noise."""

    require_same_release: bool = True
    """Take in only hospitals with this release of hospital-federation and of Flower."""

    @model_validator(mode="after")
    def _ema_exists(self) -> Self:
        if self.final_model == "ema" and self.ema_decay == 0:
            raise ValueError("final-model = 'ema' needs ema-decay above 0, for example 0.9")
        return self


class RuntimeSection(Section):
    """Where this run keeps its files on the server's machine; never part of the public plan."""

    run_folder: str = ""
    """Folder of this run; empty makes a new one under `runs/`."""
    initial_weights: str = ""
    """safetensors file of the initial weights; empty makes them from the seed."""
    hospitals: str = ""
    """Folder with one prepared hospital per sub-folder (simulations); empty outside."""
    expected_hospitals: int = Field(default=0, ge=0, le=MOST_HOSPITALS)
    """Hospitals to wait for before round 1; 0 means whoever is there at the quorum."""
    roster: str = ""
    """File of the enrolled hospitals, the only ones that are asked; empty (simulations) asks every node."""
    receipts: str = ""
    """Folder of the hospitals' newest ledger receipts over all runs; empty keeps them in the run folder."""
