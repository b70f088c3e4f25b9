"""Which steps are measured: a network, an image size, a batch (imports no torch)."""

import re
from dataclasses import dataclass
from typing import Self

from common.errors import ConfigError
from common.models.names import MODELS


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
ALL_CASES = (
    "cnn-small:28:128,cnn:28:128,cnn:64:64,cnn:150:32,cnn-flatten:28:128,cnn-flatten:64:64,cnn-flatten:150:32,"
    "resnet18:64:64,cnn:28:128:ragged,resnet18:64:64:ragged"
)


def parse_cases(text: str) -> tuple[StepCase, ...]:
    """Read cases separated by commas; `default` and `all` are lists of their own. Raises ConfigError."""
    text = {"default": DEFAULT_CASES, "all": ALL_CASES}.get(text.strip(), text)
    return tuple(dict.fromkeys(StepCase.parse(part) for part in text.split(",")))
