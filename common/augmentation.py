"""The section `[augmentation]`: how training changes each image at random, anew in every step."""

from typing import Literal

from pydantic import Field

from common.settings import Section


class AugmentationSection(Section):
    """Random changes of training images; as installed there are none. Evaluation and prediction use none."""

    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    """Mirrored with probability one half: `horizontal` swaps left and right; for `both` each by itself."""
    rotate: float = Field(default=0.0, ge=0, le=180)
    """Turned by at most so many degrees either way."""
    shift: float = Field(default=0.0, ge=0, le=0.5)
    """Moved by at most this share of height and width, each way by itself."""
    scale: float = Field(default=0.0, ge=0, le=0.5)
    """Enlarged or reduced by a factor between 1 - scale and 1 + scale."""
    elastic: float = Field(default=0.0, ge=0, le=0.1)
    """Bent: standard deviation of how far its control points move, as a share of the side."""
    elastic_points: int = Field(default=4, ge=3, le=16)
    """Control points along each side; more bend finer."""
    brightness: float = Field(default=0.0, ge=0, le=0.5)
    """At most this share of the range from black to white is added or taken away."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Contrast around middle grey times a factor between 1 - contrast and 1 + contrast."""
    noise: float = Field(default=0.0, ge=0, le=0.5)
    """Standard deviation of Gaussian noise on each pixel, as a share of the range from black to white."""

    @property
    def moves(self) -> bool:
        """Whether pixels are sampled at other places."""
        return max(self.rotate, self.shift, self.scale, self.elastic) > 0

    @property
    def shades(self) -> bool:
        """Whether shades change."""
        return max(self.brightness, self.contrast, self.noise) > 0

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return self.flip != "none" or self.moves or self.shades


OFF = AugmentationSection()
