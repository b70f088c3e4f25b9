"""A hospital's configuration: identity, data, policy, site (read by `common.settings`)."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from common.names import NAME
from common.settings import Section

_LAST_PORT = 65535


class HospitalSection(Section):
    """Who this hospital is."""

    name: str = Field(pattern=NAME)
    """Name on the federation's roster: letters, digits, dot, dash, underscore."""
    enrolled_patients: int = Field(ge=1)
    """The one public, rounded count: divisor, weight and delta use only this."""


class DataConfig(Section):
    """Where the images are and how to read them; never leaves the hospital."""

    path: str
    """A `.npz`, a folder `split/class/*` or `class/*`, or a CSV manifest."""
    path_column: str = ""
    """CSV: column of the image file; empty finds it by its name."""
    path_root: str = ""
    """CSV: folder that the image paths start from; empty is the CSV's own."""
    label_column: str = ""
    """CSV: column of the label; empty finds it by its name. Several columns of yes and no: with commas
    between them findings, with > between them the steps of a ladder of levels (docs/tasks.md)."""
    patient_column: str = ""
    """CSV: column of the patient; empty finds it by its name, and without one every image is its own unit."""
    split_column: str = ""
    """CSV: column of train/val/test; empty finds it by its name."""
    frame_column: str = ""
    """CSV: column of the frame or slice, from 1; empty finds it by its name, blank is the middle one."""
    volume_column: str = ""
    """CSV: column of a 4-D file's volume, from 1; empty finds it by its name, blank is the first."""
    classes: tuple[str, ...] = Field(default=(), max_length=1000)
    """The only class names that a run may use here, in label order; empty takes those of the run."""
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of patients kept from training where the data name no validation split; by a keyed hash."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Larger images are skipped before decoding (decompression bombs)."""
    max_skipped_share: float = Field(default=0.05, ge=0, le=1)
    """Above this share of unusable images the hospital stops."""


class PolicyConfig(Section):
    """The hospital's own privacy policy; what a server asks can only be stricter."""

    mode: Literal["solve", "fixed"] = "solve"
    """`solve`: noise from what this run may spend. `fixed`: noise given, leave when no round fits."""
    epsilon: float = Field(default=8.0, gt=0)
    """Budget of the worst-off patient over everything ever trained here."""
    run_epsilon: float | None = Field(default=None, gt=0)
    """What one run may spend of the budget at most; without it a run may spend all that is left."""
    composition: Literal["site", "patient"] = "site"
    """What a run's noise and refusals go by. `site`: every charge of the ledger counts as if all patients had
    been in it, so that neither tells who took part before. `patient`: the worst-off patient of the run's
    own; spends less where studies share no patients, and noise and refusals can tell that they do."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """Delta of the budget; without it 1 / (10 * enrolled patients)."""
    noise_multiplier: float | None = Field(default=None, gt=0)
    """Noise for mode `fixed`."""
    minimum_noise_multiplier: float = Field(default=0.3, gt=0)
    """Floor: less noise is never used."""
    maximum_noise_multiplier: float = Field(default=500.0, gt=0)
    """Ceiling: a plan that needs more is refused, it would only train on noise."""
    maximum_clip_norm: float = Field(default=100.0, gt=0)
    """Ceiling for the server's clipping norm."""
    maximum_rounds: int = Field(default=10_000, ge=1)
    """Ceiling for the rounds of one run."""
    maximum_local_steps: int = Field(default=1_000, ge=1)
    """Ceiling for the steps of one round."""
    maximum_steps: int = Field(default=100_000, ge=1)
    """Ceiling for the steps of a whole run."""
    maximum_image_size: int = Field(default=512, ge=8)
    """Ceiling for the side of the images, in pixels: memory and time grow with its square."""
    maximum_round_s: float = Field(default=86_400.0, gt=0)
    """Ceiling for the seconds that one round may take."""
    minimum_patients: int = Field(default=2, ge=1)
    """With fewer patients the hospital does not train."""
    unit: Literal["patient", "any"] = "any"
    """`patient` refuses runs that protect single images only."""
    models: tuple[str, ...] = Field(default=(), max_length=100)
    """Names of the models that may be trained; empty allows all that this release has."""
    tasks: tuple[str, ...] = Field(default=(), max_length=100)
    """Tasks that may be trained for; empty allows all that this release has."""
    approval: Literal["automatic", "plan", "update"] = "automatic"
    """`automatic`: this policy decides. `plan`: a person approves each run's plan before anything is trained.
    `update`: also each update before it leaves (`flower-client approve`)."""
    allow_non_private: bool = False
    """Take part in runs without differential privacy."""

    @model_validator(mode="after")
    def _fixed_names_its_noise(self) -> Self:
        if self.mode == "fixed" and self.noise_multiplier is None:
            raise ValueError("mode = 'fixed' needs noise-multiplier, for example 1.2")
        if self.minimum_noise_multiplier > self.maximum_noise_multiplier:
            raise ValueError("minimum-noise-multiplier is above maximum-noise-multiplier")
        return self


class ReleaseConfig(Section):
    """Which numbers about validation patients may leave, noised and charged, and at what cost."""

    metrics: tuple[Literal["confusion", "scores"], ...] = ("confusion", "scores")
    """`confusion`: counts by true and predicted class. `scores`: histogram of scores per class, for AUC."""
    epsilon: float = Field(default=1.0, gt=0)
    """Cost of one evaluation to a validation patient; less is noisier."""
    maximum_per_run: int = Field(default=4, ge=0)
    """Evaluations in one run at most."""


class RetentionConfig(Section):
    """How long the hospital keeps what it no longer needs; the ledger is kept for ever."""

    outbox_days: float = Field(default=30.0, gt=0)
    """Sealed answers of runs that are over; they are needed only while a server may ask again."""
    cache_days: float = Field(default=90.0, gt=0)
    """Decoded images that no run has used since."""
    log_days: float = Field(default=365.0, gt=0)
    """Lines of the hospital's own logs and of audit.jsonl."""
    models_days: float = Field(default=3650.0, gt=0)
    """Models received at the end of runs, with their certificates."""


class SiteConfig(Section):
    """Folders and hardware of the hospital's machine."""

    ledger: str = ""
    """Folder of the privacy ledger, one for all studies of the site; empty is the user's state folder."""
    cache: str = ""
    """Folder for decoded images, readable by its owner only; empty is `cache` beside this file."""
    state: str = ""
    """Folder of sealed answers and received models; empty is `state` beside this file."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu or cuda:N."""
    threads: int = Field(default=0, ge=0, le=1024)
    """Threads of the worker's arithmetic; 0 uses every core."""


class ConnectionConfig(Section):
    """How the hospital reaches the federation; paths start from the folder of this file."""

    enrolment: str = "enrolment.toml"
    """File from the operator: address, certificate authority, roster entry."""
    key: str = "keys/hospital.key"
    """The hospital's private key; readable by its owner only."""
    https_proxy: str = ""
    """http://host:port of the hospital's proxy; empty goes straight out, or by HTTPS_PROXY."""
    runtime_port: int = Field(default=9094, ge=1, le=65535)
    """Port on 127.0.0.1 between Flower's SuperNode and the worker."""
    health_port: int = Field(default=9095, ge=1, le=65535)
    """Port on 127.0.0.1 that answers gRPC health."""

    @model_validator(mode="after")
    def _two_ports(self) -> Self:
        if self.runtime_port == self.health_port:
            other = self.runtime_port + (1 if self.runtime_port < _LAST_PORT else -1)
            raise ValueError(
                f"connection.runtime-port and connection.health-port are both {self.runtime_port}, "
                f"and two programs listen there: write for example health-port = {other}"
            )
        return self


class HospitalConfig(Section):
    """A hospital's TOML file: identity, data, policy, site."""

    hospital: HospitalSection
    data: DataConfig
    policy: PolicyConfig = PolicyConfig()
    release: ReleaseConfig = ReleaseConfig()
    retention: RetentionConfig = RetentionConfig()
    site: SiteConfig = SiteConfig()
    connection: ConnectionConfig = ConnectionConfig()

    @property
    def delta(self) -> float:
        """Delta of the budget, by default 1 / (10 n) for the enrolled n."""
        return self.policy.delta or 1 / (10 * self.hospital.enrolled_patients)

    def ledger_folder(self, folder: Path) -> Path:
        """Where the ledger lies, for a `hospital.toml` in `folder`.

        Two studies on the same patients must compose, so the default belongs to the user, not to the study.
        """
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        return folder / (self.site.ledger or state / "hospital-federation" / "ledger")
