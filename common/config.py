"""The two configurations: one of the federation, one of a hospital (read by `common.settings`)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from common.settings import Section


class FederationSection(Section):
    """What kind of run this is."""

    name: str = Field(default="federation", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the study: letters, digits, dot, dash, underscore."""
    rounds: int = Field(default=20, ge=1, le=100_000)
    """Rounds of training."""
    private: bool = True
    """Train under differential privacy. False must be asked for by name and is said everywhere."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Fixes partition, split and initial weights; never the noise of a private run."""
    reproducible: bool = False
    """Also derive sampling and noise from the seed. For tests: the run claims no privacy."""


class DataContract(Section):
    """What every hospital's images look like to the model; public."""

    task: Literal["classification"] = "classification"
    """Kind of target."""
    classes: tuple[str, ...] = ("negative", "positive")
    """Class names in label order; for two classes the last one is the finding."""
    image_size: int = Field(default=28, ge=8, le=2048)
    """Side of the square image in pixels."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for colour."""
    unit: Literal["patient", "image"] = "patient"
    """Who is protected: a patient with all their images, or (where no patient id is known) one image."""

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> Self:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"needs at least two distinct classes, got {list(self.classes)}")
        return self


class ModelSection(Section):
    """Which network."""

    name: str = "cnn-small"
    """A name from the model registry."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Non-linearity; bounded tanh copes better with clipping and noise."""


class TrainingConfig(Section):
    """How a hospital trains: knobs that do not change the privacy guarantee."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    """Local optimiser; its state starts afresh each round."""
    learning_rate: float = Field(default=0.5, gt=0)
    """Step size of the local optimiser."""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """How the step size changes over the rounds."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of local SGD."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Pull towards zero, applied after the noise (it depends on no patient)."""
    batch_size: int = Field(default=64, ge=1)
    """Images in a step without privacy; under privacy the sampling rate decides."""
    physical_batch_size: int = Field(default=256, ge=1)
    """Rows computed at once, to bound memory; changes nothing else."""


class PrivacyKnobs(Section):
    """Public numbers that decide the privacy guarantee together with each hospital's noise."""

    sampling_rate: float = Field(default=0.5, gt=0, le=1)
    """Probability q with which each patient enters a step (Poisson sampling)."""
    l2_clip_norm: float = Field(default=1.0, gt=0)
    """Bound C on the norm of one patient's summed gradient."""
    local_steps: int = Field(default=1, ge=1, le=10_000)
    """Optimiser steps in a hospital per round (also without privacy)."""
    max_images_per_patient: int = Field(default=4, ge=1)
    """At most this many images of a patient enter one step (K)."""
    minimum_noise_multiplier: float = Field(default=0.0, ge=0)
    """The server may ask for more noise than a hospital's policy, never for less."""


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
    quorum: int = Field(default=1, ge=1)
    """Updates that a round needs to count."""
    patience_s: float = Field(default=600.0, gt=0)
    """Seconds to wait for the quorum before the run ends as `quorum-lost`."""
    deadline_s: float = Field(default=3600.0, gt=0)
    """Seconds a hospital has for one round."""
    keep_checkpoints: int = Field(default=3, ge=2)
    """Newest checkpoints that are kept."""
    update_norm_factor: float = Field(default=10.0, gt=1)
    """An update whose norm exceeds the plan's bound by this factor is refused."""

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
    expected_hospitals: int = Field(default=0, ge=0)
    """Hospitals to wait for before round 1; 0 means whoever is there at the quorum."""


class PublicPlan(Section):
    """What every hospital is told about the run; a hospital's policy may only tighten it."""

    federation: FederationSection = FederationSection()
    data: DataContract = DataContract()
    model: ModelSection = ModelSection()
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyKnobs = PrivacyKnobs()

    @property
    def model_spec(self) -> "ModelSpec":
        """What the registry needs to build the network."""
        return ModelSpec(
            name=self.model.name,
            activation=self.model.activation,
            channels=self.data.channels,
            image_size=self.data.image_size,
            num_outputs=len(self.data.classes),
        )

    @property
    def claims_privacy(self) -> bool:
        """Whether epsilon may be stated: private, and not in reproducible mode."""
        return self.federation.private and not self.federation.reproducible


class FederationConfig(PublicPlan):
    """The federation's TOML file: the public plan and what only the server needs."""

    server: ServerSection = ServerSection()
    runtime: RuntimeSection = RuntimeSection()

    @property
    def public_plan(self) -> PublicPlan:
        """The part that hospitals receive."""
        return PublicPlan(
            federation=self.federation,
            data=self.data,
            model=self.model,
            training=self.training,
            privacy=self.privacy,
        )


class ModelSpec(Section):
    """A network, independent of any data."""

    name: str
    """Name in the registry."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Non-linearity."""
    channels: int = Field(ge=1)
    """Input channels."""
    image_size: int = Field(ge=8)
    """Side of the square input in pixels."""
    num_outputs: int = Field(ge=1)
    """Width of the last layer."""


class HospitalSection(Section):
    """Who this hospital is."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
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
    """CSV: column of the label; empty finds it by its name."""
    patient_column: str = ""
    """CSV: column of the patient; empty finds it by its name, and without one every image is its own unit."""
    split_column: str = ""
    """CSV: column of train/val/test; empty finds it by its name."""
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of patients kept from training where the data name no split; decided by a keyed hash."""
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
    minimum_patients: int = Field(default=2, ge=1)
    """With fewer patients the hospital does not train."""
    allow_non_private: bool = False
    """Take part in runs without differential privacy."""

    @model_validator(mode="after")
    def _fixed_names_its_noise(self) -> Self:
        if self.mode == "fixed" and self.noise_multiplier is None:
            raise ValueError("mode = 'fixed' needs noise-multiplier, for example 1.2")
        if self.minimum_noise_multiplier > self.maximum_noise_multiplier:
            raise ValueError("minimum-noise-multiplier is above maximum-noise-multiplier")
        return self


class SiteConfig(Section):
    """Folders and hardware of the hospital's machine."""

    ledger: str = ""
    """Folder of the privacy ledger, one for all studies of the site; empty is `ledger` beside this file."""
    cache: str = ""
    """Folder for decoded images, readable by its owner only; empty is `cache` beside this file."""
    state: str = ""
    """Folder of sealed answers and received models; empty is `state` beside this file."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu or cuda:N."""
    threads: int = Field(default=0, ge=0)
    """Threads of one training process; 0 leaves the choice to the engine."""


class HospitalConfig(Section):
    """A hospital's TOML file: identity, data, policy, site."""

    hospital: HospitalSection
    data: DataConfig
    policy: PolicyConfig = PolicyConfig()
    site: SiteConfig = SiteConfig()

    @property
    def delta(self) -> float:
        """Delta of the budget, by default 1 / (10 n) for the enrolled n."""
        return self.policy.delta or 1 / (10 * self.hospital.enrolled_patients)
