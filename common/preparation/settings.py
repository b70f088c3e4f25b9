"""The section `[preprocessing]`: what every hospital does to every image, training or asked about.

As installed it does what releases without this section did. The order of the steps is fixed, whatever the
order of the keys (docs/preprocessing.md): window or percentiles, colour, mask, crop, resize, denoise, CLAHE,
padding; then 8 bits; then standardise.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from common.settings import Section

_STRENGTH, _TILES, _MARGIN, _MEAN, _SPREAD = 1.0, 8, 0.02, (0.5,), (0.25,)
LEAST_TILE = 4
"""Pixels along a tile of CLAHE; smaller ones have no histogram worth the name."""


class PreprocessingSection(Section):
    """From a picture of any size to what the model sees."""

    window: tuple[float, ...] = Field(default=(), max_length=2)
    """[centre, width] of the values that are shown from black to white; empty: as a viewer shows the file."""
    window_units: Literal["hounsfield", "file"] = "hounsfield"
    """`hounsfield` refuses what does not state them; `file` takes whatever units a deep file has."""
    clip_percentiles: tuple[float, ...] = Field(default=(), max_length=2)
    """[low, high] of each picture's values, in percent: black below, white above. Empty: not clipped."""
    colour: Literal["convert", "refuse"] = "convert"
    """What a grey model does with a coloured picture and a colour model with a grey one."""
    mask: Literal["none", "body", "lungs"] = "none"
    """Everything else becomes black: outside the body, or outside the lung fields of a chest film."""
    crop: Literal["none", "centre", "foreground"] = "none"
    """`centre` keeps `crop-share` of each side, `foreground` the box around what is not background."""
    crop_share: float = Field(default=1.0, ge=0.1, le=1)
    """Share of height and width that `centre` keeps, around the middle."""
    crop_margin: float = Field(default=_MARGIN, ge=0, le=0.5)
    """Share of the box's sides that `foreground` leaves around it."""
    resize: Literal["stretch", "pad"] = "stretch"
    """To the model's square: `stretch` both sides, or keep the aspect and `pad` with black."""
    denoise: Literal["none", "gaussian", "median", "non-local-means"] = "none"
    """Filter in the model's pixels, after resizing."""
    denoise_strength: float = Field(default=_STRENGTH, gt=0, le=10)
    """Pixels: gaussian's standard deviation, median's radius; non-local-means: twentieths of the range."""
    clahe: float = Field(default=0.0, ge=0, le=1)
    """Clip limit of local histogram equalisation, such as 0.01; 0 switches it off."""
    clahe_tiles: int = Field(default=_TILES, ge=1, le=32)
    """Tiles along each side."""
    standardise: Literal["fixed", "none"] = "fixed"
    """`fixed`: (value - mean) / standard-deviation; `none`: values from 0 to 1."""
    mean: tuple[float, ...] = Field(default=_MEAN, min_length=1, max_length=3)
    """One number, or one for each channel, on the scale from 0 to 1; public, never taken from patients."""
    standard_deviation: tuple[float, ...] = Field(default=_SPREAD, min_length=1, max_length=3)
    """The same; above 0."""

    @property
    def changes_pixels(self) -> bool:
        """Whether any step but the last differs from what is done as installed."""
        return self.of_pixels != PreprocessingSection()

    @property
    def is_standardised_otherwise(self) -> bool:
        """Whether the last step differs from what is done as installed."""
        return self != self.of_pixels

    @property
    def of_pixels(self) -> "PreprocessingSection":
        """Without standardisation, which the stored pixels do not know."""
        return self.model_copy(update={"standardise": "fixed", "mean": _MEAN, "standard_deviation": _SPREAD})

    @property
    def uses_libraries(self) -> bool:
        """Whether scipy or scikit-image form pixels."""
        found = (self.mask != "none", self.crop == "foreground", self.denoise != "none", self.clahe > 0)
        return any(found)

    def check_images(self, *, channels: int, image_size: int) -> None:
        """Raise ValueError where images of this kind cannot be prepared so."""
        if channels == 3 and self.window:
            raise ValueError("a window needs one grey value in each pixel; write data.channels = 1")
        if channels == 3 and self.mask == "lungs":
            raise ValueError("lung fields are found on grey films; write data.channels = 1")
        if {len(self.mean), len(self.standard_deviation)} - {1, channels}:
            raise ValueError(
                f"mean and standard-deviation have other lengths than 1 and {channels} channels; "
                "write one number, or one for each channel"
            )
        if self.clahe and image_size < LEAST_TILE * self.clahe_tiles:
            raise ValueError(
                f"{self.clahe_tiles} tiles of {image_size} px are smaller than {LEAST_TILE} px; "
                f"write clahe-tiles = {max(1, image_size // LEAST_TILE)} or less"
            )

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.window and (len(self.window) != 2 or self.window[1] <= 0):
            raise ValueError("a window is a centre and a width above 0; write window = [40, 400]")
        if self.clip_percentiles:
            if len(self.clip_percentiles) != 2:
                raise ValueError("two percentiles are needed; write clip-percentiles = [0.5, 99.5]")
            low, high = self.clip_percentiles
            if not 0 <= low < high <= 100:
                raise ValueError("percentiles rise from 0 to 100; write clip-percentiles = [0.5, 99.5]")
        if self.window and self.clip_percentiles:
            raise ValueError(
                "window and clip-percentiles both say what is black and white; write one of them"
            )
        if self.window_units != "hounsfield" and not self.window:
            raise ValueError("window-units has no window; write window = [40, 400] beside it")
        return self

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if self.crop == "centre" and self.crop_share == 1:
            raise ValueError("crop = 'centre' keeps everything; write crop-share = 0.9 beside it")
        if self.crop != "centre" and self.crop_share != 1:
            raise ValueError("crop-share belongs to crop = 'centre'; write that, or leave crop-share out")
        if self.crop != "foreground" and self.crop_margin != _MARGIN:
            raise ValueError("crop-margin belongs to crop = 'foreground'; write that, or leave it out")
        return self

    @model_validator(mode="after")
    def _filters(self) -> Self:
        if self.denoise == "none" and self.denoise_strength != _STRENGTH:
            raise ValueError("denoise-strength has no filter; write denoise = 'gaussian' beside it")
        if self.denoise == "median" and not self.denoise_strength.is_integer():
            raise ValueError("a median's radius is whole pixels; write denoise-strength = 1")
        if not self.clahe and self.clahe_tiles != _TILES:
            raise ValueError("clahe-tiles without CLAHE; write clahe = 0.01 beside it")
        return self

    @model_validator(mode="after")
    def _standard(self) -> Self:
        if self.standardise == "none" and (self.mean, self.standard_deviation) != (_MEAN, _SPREAD):
            raise ValueError("standardise = 'none' uses no mean; write standardise = 'fixed', or no mean")
        if min(self.standard_deviation) <= 0:
            raise ValueError("a standard deviation must be above 0; write standard-deviation = [0.25]")
        if {2} & {len(self.mean), len(self.standard_deviation)}:
            raise ValueError("images have 1 or 3 channels; write one number, or three")
        return self


AS_INSTALLED = PreprocessingSection()
