"""Which steps are measured: a network, an image size, a batch (imports no torch by itself)."""

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from common.errors import ConfigError
from common.models.names import MODELS
from common.series_form import TIME_FEATURES

if TYPE_CHECKING:
    from common.config import ModelSpec

SERIES_STEPS = 6
"""Images of each series that is measured."""


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """A step of training to measure."""

    model: str
    """Name from the model registry."""
    image_size: int
    """Side of the square image in pixels."""
    batch_size: int
    """Rows (images) in the step."""
    ragged: bool = False
    """Two to five images per patient; otherwise one."""
    channels: int = 1

    @property
    def name(self) -> str:
        """As in the results, for example `cnn 28px/128`."""
        return f"{self.model} {self.image_size}px/{self.batch_size}{' ragged' if self.ragged else ''}"

    @property
    def text(self) -> str:
        """As on the command line, the inverse of `parse`."""
        return f"{self.model}:{self.image_size}:{self.batch_size}{':ragged' if self.ragged else ''}"

    @property
    def num_parameters(self) -> int:
        """Of the network (imports torch)."""
        from common.models.registry import parameter_template

        return sum(math.prod(shape) for shape in parameter_template(self.spec).values())

    @property
    def spec(self) -> "ModelSpec":
        """The network, with two outputs; models of series take SERIES_STEPS images a row."""
        from common.config import ModelSpec

        return ModelSpec(
            name=self.model,
            channels=self.channels,
            image_size=self.image_size,
            num_outputs=2,
            steps=SERIES_STEPS if MODELS[self.model].series else 1,
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        if MODELS[self.model].series:
            return (SERIES_STEPS, self.channels * self.image_size**2 + TIME_FEATURES)
        return (self.channels, self.image_size, self.image_size)

    @property
    def even(self) -> "StepCase":
        """The same rows, one for each patient."""
        return replace(self, ragged=False)

    @property
    def with_ragged(self) -> "StepCase":
        """The same rows, two to five for each patient."""
        return replace(self, ragged=True)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `cnn:28:128` or `cnn:28:128:ragged`; raises ConfigError."""
        found = re.fullmatch(r"([a-z0-9-]+):(\d{1,4}):(\d{1,5})(:ragged)?", text.strip())
        if found is None:
            raise ConfigError(
                f"--cases {text!r} is no case", fix="write model:pixels:batch, for example cnn:28:128"
            )
        model, pixels, rows, ragged = found.groups()
        if model not in MODELS or int(pixels) < MODELS[model].minimum_image_size or int(rows) < 1:
            known = ", ".join(f"{name} from {known.minimum_image_size} px" for name, known in MODELS.items())
            raise ConfigError(
                f"--cases {text!r} cannot be measured",
                why=f"models are {known}",
                fix="write model:pixels:batch, for example cnn:28:128",
            )
        return cls(model=model, image_size=int(pixels), batch_size=int(rows), ragged=bool(ragged))


DEFAULT_CASES = "cnn-small:28:128,cnn:28:128"
"""Ends within three minutes on two cores, everything else included."""
FIGURE_STEPS = (
    "cnn:28:128",
    "cnn:64:64",
    "cnn:150:32",
    "cnn-flatten:28:128",
    "cnn-flatten:64:64",
    "cnn-flatten:150:32",
    "resnet18:64:64",
)
"""The steps that have a bar in docs/benchmarks.md."""
ALL_CASES = ",".join(
    ["cnn-small:28:128", *(text + ragged for text in FIGURE_STEPS for ragged in ("", ":ragged"))]
)
"""Those, each also with ragged patients, and the network of the defaults."""


def parse_cases(text: str) -> tuple[StepCase, ...]:
    """Read cases separated by commas; `default` and `all` are lists of their own. Raises ConfigError."""
    text = {"default": DEFAULT_CASES, "all": ALL_CASES}.get(text.strip(), text)
    return tuple(dict.fromkeys(StepCase.parse(part) for part in text.split(",")))
