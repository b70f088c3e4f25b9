"""From a picture to what the model sees: the same fixed arithmetic in every hospital, nothing fitted.

The steps are configured in `[preprocessing]` (`common.preparation`, docs/preprocessing.md); what is done as
installed stands here.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from common.errors import ConfigError
from common.intensities import RULE, Intensities, Span, kept_apart, rounded
from common.preparation.places import resized
from common.preparation.settings import AS_INSTALLED, PreprocessingSection
from common.settings import parse, to_nested

if TYPE_CHECKING:
    from common.config import PublicPlan

CENTRE, SPREAD = 0.5, 0.25
"""Constants of `standardise` as installed; means of real patients would be one more thing to protect."""
_FIXED = {"resize": "bilinear-antialiased", "centre": CENTRE, "spread": SPREAD, "depth": RULE}
_BY_STEPS = {**_FIXED, "resize": "by steps", "centre": "by steps", "spread": "by steps"}
"""What is said in their place where steps are configured: releases that know no steps refuse it."""
_LIBRARIES = ("scipy", "scikit-image")
Picture = Image.Image | Intensities
"""What `Preprocessing` takes: 8 bits as an image, more as intensities."""


def upright(image: Image.Image) -> Picture:
    """Turn by the EXIF orientation and reduce any 8-bit mode to `L` or `RGB`; no change if it is that.

    Transparency is laid over black. Deeper than 8 bits become intensities that are shown from one quantile
    to the other: 12-bit scanner data in a 16-bit file stay visible.
    """
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith(("I", "F")):
        return deep(np.asarray(image))
    if image.mode == "1":
        return image.convert("L")
    if image.has_transparency_data:
        grey = image.mode in ("LA", "La")
        opaque = image.convert("RGBA")
        black = Image.new("RGBA", opaque.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, opaque).convert("L" if grey else "RGB")
    return image.convert("RGB")


def deep(pixels: NDArray[Any]) -> Intensities:
    """Intensities of an array (H, W) or (H, W, 3) that nothing says more about."""
    values = kept_apart(pixels, pixels.dtype)
    return Intensities(values=values, shown=Span.of(values))


def eight_bits(picture: Picture) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3): an upright picture at its full size as a screen shows it."""
    return picture.eight_bits() if isinstance(picture, Intensities) else np.asarray(picture)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How pictures of any size and mode become one array; stored beside the model."""

    image_size: int
    """Side of the square in pixels."""
    channels: int
    """1 for grey, 3 for colour."""
    steps: PreprocessingSection = AS_INSTALLED
    """As installed the whole picture is stretched to the square, nothing is cropped away or filtered."""

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.channels not in (1, 3):
            raise ValueError(f"image_size {self.image_size} must be >= 1, channels {self.channels} 1 or 3")
        self.steps.check_images(channels=self.channels, image_size=self.image_size)

    @classmethod
    def of(cls, plan: "PublicPlan") -> Self:
        """What every hospital of a federation does."""
        data = plan.data
        return cls(image_size=data.image_size, channels=data.channels, steps=plan.preprocessing)

    @property
    def of_pixels(self) -> Self:
        """The part that `fit` does, without `standardise`: what decoded pixels depend on."""
        return replace(self, steps=self.steps.of_pixels)

    @property
    def moves_places(self) -> bool:
        """Whether a place in the model's square is not the same share of the whole picture."""
        return self.steps.crop != "none" or self.steps.resize == "pad"

    @property
    def mark(self) -> str:
        """Tells pixels of one preprocessing from those of another; empty as installed."""
        if not self.steps.changes_pixels:
            return ""
        return hashlib.sha256(json.dumps(self.of_pixels.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def libraries(self) -> dict[str, str]:
        """Versions of what forms pixels besides Pillow and numpy; read without importing any."""
        if not self.steps.uses_libraries:
            return {}
        return {name: importlib.metadata.version(name) for name in _LIBRARIES}

    def fit(self, picture: Picture) -> NDArray[np.uint8]:
        """Any Pillow image or intensities to uint8 (channels, image_size, image_size).

        Raises CannotPrepareError where the picture cannot be brought to that.
        """
        image = picture if isinstance(picture, Intensities) else upright(picture)
        if self.steps.changes_pixels:
            from common.preparation.pipeline import prepared

            return prepared(image, self.steps, channels=self.channels, image_size=self.image_size)
        if isinstance(image, Intensities):
            return self._fit_deep(image)
        mode = "L" if self.channels == 1 else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        size = (self.image_size, self.image_size)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if self.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _fit_deep(self, picture: Intensities) -> NDArray[np.uint8]:
        """Resized as float32, rounded last."""
        shades = picture.grey_shades()[..., None] if self.channels == 1 else picture.shades()
        shades = shades[..., None] if shades.ndim == 2 else shades
        size = (self.image_size, self.image_size)
        planes = [rounded(resized(shades[..., plane], size)) for plane in range(shades.shape[2])]
        return np.stack(planes if len(planes) == self.channels else planes * 3)

    def fit_array(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (rows, H, W) or (rows, H, W, 3) to uint8 (rows, channels, image_size, image_size).

        The same result as `fit` row by row. Raises ValueError for other shapes or types.
        """
        colour = images.ndim == 4 and images.shape[3] == 3
        if images.dtype != np.uint8 or not (colour or images.ndim == 3):
            raise ValueError(f"expected uint8 (rows, H, W[, 3]), got {images.dtype} {images.shape}")
        if self.keeps(images):
            return self.channels_first(images)
        fitted = np.empty((len(images), self.channels, self.image_size, self.image_size), np.uint8)
        for row, pixels in enumerate(images):
            fitted[row] = self.fit(Image.fromarray(pixels))
        return fitted

    def channels_first(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Images (rows, H, W) or (rows, H, W, 3) of the right size as (rows, channels, H, W)."""
        converted = _grey(images) if images.ndim == 4 and self.channels == 1 else images
        if converted.ndim == 4:
            return np.ascontiguousarray(converted.transpose(0, 3, 1, 2))
        return np.repeat(converted[:, None], 3, axis=1) if self.channels == 3 else converted[:, None]

    def keeps(self, images: NDArray[Any]) -> bool:
        """Whether images (rows, H, W, ...) have the right size and nothing else is done to them."""
        return bool(images.shape[1:3] == (self.image_size, self.image_size)) and not self.steps.changes_pixels

    def standardise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 to float32 of the same shape: (x / 255 - mean) / deviation, within [-2, 2] as installed.

        Where each channel has its own numbers, images are (..., channels, H, W).
        """
        values = images.astype(np.float32)
        if self.steps.standardise == "none":
            return values / np.float32(255)
        mean, deviation = np.array(self.steps.mean), np.array(self.steps.standard_deviation)
        scale, offset = (1 / (255 * deviation)).astype(np.float32), (mean / deviation).astype(np.float32)
        values *= scale[0] if len(scale) == 1 else scale[:, None, None]
        values -= offset[0] if len(offset) == 1 else offset[:, None, None]
        return values

    def to_dict(self) -> dict[str, Any]:
        """For model.json; holds the fixed arithmetic too, so that a later reader can check it."""
        kept: dict[str, Any] = {"image_size": self.image_size, "channels": self.channels}
        if self.steps == AS_INSTALLED:
            return {**kept, **_FIXED}
        return {**kept, **_BY_STEPS, "steps": to_nested(self.steps)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_dict`; ValueError when the model was trained with other arithmetic than this."""
        for key, expected in (_BY_STEPS if "steps" in values else _FIXED).items():
            if values.get(key, expected) != expected:
                raise ValueError(f"preprocessing {key} is {values[key]!r}, this version does {expected!r}")
        try:
            steps = parse(PreprocessingSection, values.get("steps", {}), source="preprocessing")
            return cls(image_size=int(values["image_size"]), channels=int(values["channels"]), steps=steps)
        except (KeyError, TypeError) as error:
            raise ValueError(f"preprocessing lacks {error}") from None
        except ConfigError as error:
            raise ValueError(f"{error.what}: {error.why}") from None


def _grey(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """ITU-R 601 luma in the fixed-point arithmetic of Pillow's `convert("L")`, so that both agree."""
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)
    grey = (images.astype(np.uint32) * weights).sum(axis=-1, dtype=np.uint32) + np.uint32(0x8000)
    eight_bits: NDArray[np.uint8] = (grey >> np.uint32(16)).astype(np.uint8)
    return eight_bits
