"""What one example is: a single image, a patient's visits, or the slices of a volume (imports no numpy)."""

from dataclasses import dataclass
from typing import Literal

from common.errors import ConfigError

SeriesKind = Literal["none", "visits", "slices"]
TIME_FEATURES = 2
"""Numbers of a step beside its image: `present` and `years`."""


@dataclass(frozen=True, kw_only=True)
class SeriesForm:
    """The public form of the examples of a run."""

    kind: SeriesKind = "none"
    steps: int = 1
    """Longest series that the model sees."""
    next_finding: bool = False
    """Whether a series ends before its last visit, whose label it is asked for."""

    @property
    def is_series(self) -> bool:
        """Whether an example is more than a single image."""
        return self.kind != "none"

    @property
    def words(self) -> str:
        """For a person."""
        if self.kind == "visits":
            asked = ", asked for the finding of the next one" if self.next_finding else ""
            return f"series of up to {self.steps} visits of a patient{asked}"
        return f"up to {self.steps} slices of a volume" if self.kind == "slices" else "single images"

    def input_shape(self, channels: int, image_size: int) -> tuple[int, ...]:
        """Shape of one row of the model's input: a picture, or (steps, features)."""
        picture = (channels, image_size, image_size)
        if not self.is_series:
            return picture
        return (self.steps, channels * image_size**2 + TIME_FEATURES)


SINGLE_IMAGES = SeriesForm()


def form_named(kind: str, steps: int) -> SeriesForm:
    """The form of a kind named on the command line. Raises ConfigError."""
    if kind == "none":
        return SINGLE_IMAGES
    if kind in ("visits", "slices"):
        return SeriesForm(kind="visits" if kind == "visits" else "slices", steps=steps)
    raise ConfigError(f"there is no series {kind!r}", fix="choose none, visits or slices")
