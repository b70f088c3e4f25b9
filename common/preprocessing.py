"""From a picture to what the model sees: the same fixed arithmetic in every hospital, nothing fitted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from common.intensities import RULE, Intensities, Span, kept_apart, rounded

CENTRE, SPREAD = 0.5, 0.25
"""Constants of `standardise`; means of real patients would be one more thing to protect."""
_FIXED = {"resize": "bilinear-antialiased", "centre": CENTRE, "spread": SPREAD, "depth": RULE}
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
    """Side of the square in pixels; the whole picture is resized, nothing is cropped away."""
    channels: int
    """1 for grey, 3 for colour."""

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.channels not in (1, 3):
            raise ValueError(f"image_size {self.image_size} must be >= 1, channels {self.channels} 1 or 3")

    def fit(self, picture: Picture) -> NDArray[np.uint8]:
        """Any Pillow image or intensities to uint8 (channels, image_size, image_size)."""
        image = picture if isinstance(picture, Intensities) else upright(picture)
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
        planes = [rounded(_resized(shades[..., plane], size)) for plane in range(shades.shape[2])]
        return np.stack(planes if len(planes) == self.channels else planes * 3)

    def fit_array(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (rows, H, W) or (rows, H, W, 3) to uint8 (rows, channels, image_size, image_size).

        The same result as `fit` row by row. Raises ValueError for other shapes or types.
        """
        colour = images.ndim == 4 and images.shape[3] == 3
        if images.dtype != np.uint8 or not (colour or images.ndim == 3):
            raise ValueError(f"expected uint8 (rows, H, W[, 3]), got {images.dtype} {images.shape}")
        if self.keeps(images):
            converted = _grey(images) if colour and self.channels == 1 else images
            if converted.ndim == 4:
                return np.ascontiguousarray(converted.transpose(0, 3, 1, 2))
            return np.repeat(converted[:, None], 3, axis=1) if self.channels == 3 else converted[:, None]
        fitted = np.empty((len(images), self.channels, self.image_size, self.image_size), np.uint8)
        for row, pixels in enumerate(images):
            fitted[row] = self.fit(Image.fromarray(pixels))
        return fitted

    def keeps(self, images: NDArray[Any]) -> bool:
        """Whether images (rows, H, W, ...) already have the right size."""
        return bool(images.shape[1:3] == (self.image_size, self.image_size))

    def standardise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 to float32 of the same shape: (x / 255 - 0.5) / 0.25, so within [-2, 2]."""
        values = images.astype(np.float32)
        values *= np.float32(1 / (255 * SPREAD))
        values -= np.float32(CENTRE / SPREAD)
        return values

    def to_dict(self) -> dict[str, Any]:
        """For model.json; holds the fixed arithmetic too, so that a later reader can check it."""
        return {"image_size": self.image_size, "channels": self.channels, **_FIXED}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_dict`; ValueError when the model was trained with other arithmetic than this."""
        for key, expected in _FIXED.items():
            if values.get(key, expected) != expected:
                raise ValueError(f"preprocessing {key} is {values[key]!r}, this version does {expected!r}")
        try:
            return cls(image_size=int(values["image_size"]), channels=int(values["channels"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"preprocessing lacks {error}") from None


def _grey(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """ITU-R 601 luma in the fixed-point arithmetic of Pillow's `convert("L")`, so that both agree."""
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)
    grey = (images.astype(np.uint32) * weights).sum(axis=-1, dtype=np.uint32) + np.uint32(0x8000)
    eight_bits: NDArray[np.uint8] = (grey >> np.uint32(16)).astype(np.uint8)
    return eight_bits


def _resized(shades: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    if shades.shape == size[::-1]:
        return shades
    plane = Image.fromarray(np.ascontiguousarray(shades))
    return np.asarray(plane.resize(size, Image.Resampling.BILINEAR))
