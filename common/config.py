"""The federation's configuration: the public plan and what only the server needs (see `common.settings`)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from common.augmentation import AugmentationSection
from common.names import NAME
from common.preparation.settings import PreprocessingSection
from common.series_form import SeriesForm
from common.server_settings import RuntimeSection, ServerSection
from common.settings import Section
from common.task_kinds import (
    ONE_CLASS_EACH,
    PROGRESSION,
    LossName,
    TaskName,
    loss_problem,
    outputs_of,
    weights_problem,
)

MOST_STEPS = 256
"""Images of a series: with the rows of a chunk they are as many terms as rounding is paid for."""


class FederationSection(Section):
    """What kind of run this is."""

    name: str = Field(default="federation", pattern=NAME)
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

    task: TaskName = "classification"
    """What is told of an image or series: docs/tasks.md, for `progression` docs/series.md."""
    classes: tuple[str, ...] = Field(default=("negative", "positive"), max_length=1000)
    """Class names in label order; for two classes the last one is the finding; levels rise."""
    image_size: int = Field(default=28, ge=8, le=2048)
    """Side of the square image in pixels."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for colour."""
    unit: Literal["patient", "image"] = "patient"
    """Who is protected: a patient with all their images, or (where no patient id is known) one image."""
    series: Literal["none", "visits", "slices"] = "none"
    """What one example is: a single image, a patient's images in order of time, or the slices of a volume."""
    steps: int = Field(default=1, ge=1, le=64)
    """Longest series that the model sees: of longer ones the latest visits, or slices evenly spread."""

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> Self:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"needs at least two distinct classes, got {list(self.classes)}")
        return self

    @model_validator(mode="after")
    def _series_has_steps(self) -> Self:
        if self.series == "none" and self.steps > 1:
            raise ValueError(f"steps = {self.steps} needs series = 'visits' or 'slices'")
        if self.series != "none" and self.steps == 1:
            raise ValueError(f"series = '{self.series}' needs steps of 2 or more, for example 6")
        if self.task == PROGRESSION and self.series != "visits":
            raise ValueError("task = 'progression' needs series = 'visits'")
        if self.series != "none" and self.task not in ONE_CLASS_EACH:
            raise ValueError(f"task = '{self.task}' has no series: write task = 'classification'")
        return self

    @property
    def series_form(self) -> SeriesForm:
        """What one example is."""
        return SeriesForm(kind=self.series, steps=self.steps, next_finding=self.task == PROGRESSION)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row of the model's input (`common.series`)."""
        return self.series_form.input_shape(self.channels, self.image_size)


class ModelSection(Section):
    """Which network."""

    name: str = "cnn-small"
    """A name from the model registry."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Non-linearity; bounded tanh copes better with clipping and noise."""
    weight_standardisation: bool = False
    """Kernels of convolutions with mean 0 and variance 1 (arXiv 1903.10520)."""


class TrainingConfig(Section):
    """How a hospital trains: knobs that do not change the privacy guarantee."""

    loss: LossName = "cross-entropy"
    """What is minimised; multi-label and ordinal tasks take bce, focal or mse."""
    focal_gamma: float = Field(default=2.0, ge=0, le=10)
    """Exponent of `focal`: how much less records count that the model knows already."""
    class_weights: tuple[float, ...] = Field(default=(), max_length=1000)
    """Public constants, one per class, that multiply the losses of its records; empty weighs all alike."""
    optimizer: Literal["sgd", "adam", "rmsprop", "adam-bc"] = "sgd"
    """Local optimiser; its state starts afresh each round. `adam-bc` (private runs) takes off the noise."""
    adam_bc_floor: float = Field(default=1e-6, gt=0)
    """Least second moment that `adam-bc` divides by the root of, once the noise is taken off."""
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
    augmentations: int = Field(default=1, ge=1, le=64)
    """Copies of each image in a step, each changed by `[augmentation]`; their gradients are averaged before
    clipping. A step takes so many times as long."""


class PrivacyKnobs(Section):
    """Public numbers that decide the privacy guarantee together with each hospital's noise."""

    sampling_rate: float = Field(default=0.5, gt=0, le=1)
    """Probability q with which each patient enters a step (Poisson sampling)."""
    l2_clip_norm: float = Field(default=1.0, gt=0)
    """Bound C on the norm of one patient's summed gradient."""
    clipping: Literal["flat", "automatic"] = "flat"
    """How the bound is kept: longer gradients are shortened, or (automatic) all are brought near it."""
    local_steps: int = Field(default=1, ge=1, le=10_000)
    """Optimiser steps in a hospital per round (also without privacy)."""
    max_images_per_patient: int = Field(default=4, ge=1, le=64)
    """At most this many images of a patient enter one step (K)."""
    minimum_noise_multiplier: float = Field(default=0.0, ge=0)
    """The server may ask for more noise than a hospital's policy, never for less."""


class EvaluationSection(Section):
    """When hospitals score the model on their validation patients; each time costs those patients privacy."""

    at_end: bool = True
    """Score the final model once."""
    checkpoints: int = Field(default=0, ge=0, le=3)
    """Score so many earlier models too, evenly spread over the rounds."""
    score_bins: int = Field(default=10, ge=2, le=100)
    """Bins of the histogram of scores, per class: more are finer and noisier."""
    score_scale: Literal["probability", "logit"] = "probability"
    """Bins of equal width of the probability, or of its logit: finer near 0 and 1, where a sure model is."""
    operating_point: str = Field(
        default="balanced", pattern=r"^(balanced|sensitivity:0?\.\d{1,4}|0?\.\d{1,4})$"
    )
    """Where to call the finding, from the noised counts: `balanced` (largest sensitivity + specificity),
    `sensitivity:0.95` (highest bin edge that reaches it), or a fixed threshold such as `0.5`."""


class WireSection(Section):
    """How updates travel; changes nothing about privacy, because it comes after the noise."""

    bits: Literal[8, 4, 32] = 8
    """Bits for each number of an update: 8 or 4 on a public grid, or 32 for plain float32."""


class PublicPlan(Section):
    """What every hospital is told about the run; a hospital's policy may only tighten it."""

    federation: FederationSection = FederationSection()
    data: DataContract = DataContract()
    preprocessing: PreprocessingSection = PreprocessingSection()
    model: ModelSection = ModelSection()
    augmentation: AugmentationSection = AugmentationSection()
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyKnobs = PrivacyKnobs()
    evaluation: EvaluationSection = EvaluationSection()
    wire: WireSection = WireSection()

    @model_validator(mode="after")
    def _copies_differ(self) -> Self:
        if self.training.augmentations > 1 and not self.augmentation.is_on:
            raise ValueError(
                "training.augmentations above 1 needs [augmentation], for example flip = 'horizontal': "
                "otherwise all copies are the same"
            )
        return self

    @model_validator(mode="after")
    def _training_fits(self) -> Self:
        training, classes = self.training, len(self.data.classes)
        problem = loss_problem(self.data.task, training.loss) or weights_problem(
            classes, training.class_weights
        )
        if problem is None and training.optimizer == "adam-bc" and not self.federation.private:
            problem = (
                "training.optimizer = 'adam-bc' takes off known noise, and a run without privacy has none"
            )
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _series_stay_as_they_are(self) -> Self:
        if self.augmentation.is_on and self.data.series != "none":
            raise ValueError("[augmentation] changes single images: leave it out with data.series")
        return self

    @model_validator(mode="after")
    def _images_can_be_prepared(self) -> Self:
        steps = self.preprocessing
        steps.check_images(channels=self.data.channels, image_size=self.data.image_size)
        if self.model.name.startswith("scattering") and steps.is_standardised_otherwise:
            raise ValueError(
                "the model scattering takes pixels as installed back from their standardisation; write "
                "preprocessing.standardise, mean and standard-deviation as installed, or another model"
            )
        return self

    @property
    def model_spec(self) -> "ModelSpec":
        """What the registry needs to build the network."""
        return ModelSpec(
            name=self.model.name,
            activation=self.model.activation,
            weight_standardisation=self.model.weight_standardisation,
            channels=self.data.channels,
            image_size=self.data.image_size,
            num_outputs=outputs_of(self.data.task, len(self.data.classes)),
            steps=self.data.steps,
        )

    @property
    def claims_privacy(self) -> bool:
        """Whether epsilon may be stated: private, and not in reproducible mode."""
        return self.federation.private and not self.federation.reproducible


class FederationConfig(PublicPlan):
    """The federation's TOML file: the public plan and what only the server needs."""

    server: ServerSection = ServerSection()
    runtime: RuntimeSection = RuntimeSection()

    @model_validator(mode="after")
    def _weights_reach_hospitals(self) -> Self:
        # On a grid hospitals apply their weights themselves, and one spacing fits those of one scale.
        if self.server.weighting == "squares" and self.wire.bits != 32:
            raise ValueError("server.weighting = 'squares' needs wire.bits = 32")
        return self

    @property
    def public_plan(self) -> PublicPlan:
        """The part that hospitals receive."""
        return PublicPlan(
            federation=self.federation,
            data=self.data,
            preprocessing=self.preprocessing,
            model=self.model,
            augmentation=self.augmentation,
            training=self.training,
            privacy=self.privacy,
            evaluation=self.evaluation,
            wire=self.wire,
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
    steps: int = Field(default=1, ge=1, le=MOST_STEPS)
    """Images of the longest series; 1 for single images (`common.models.series`)."""
    weight_standardisation: bool = False
    """Whether convolutions have standardised kernels."""
