"""Rules by which a picture is not answered, because it is none of the kind that the model was trained on.

Every rule is fixed arithmetic on the one picture: nothing is fitted on anybody's patients, so nothing travels
with the model that would have to be charged. The constants were set by eye, those of `inverted` on public
images (docs/predict.md says how often it is wrong on them).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.preparation.shades import COLOURED_SHARE, coloured_share
from common.preprocessing import Picture, Preprocessing, eight_bits

LEAST_SHARE_OF_SIZE: Final = 0.5
"""The shorter side must have this share of the model's image size: more would be invented than seen."""
MOST_ASPECT: Final = 3.0
"""Longer side by shorter side."""
BLACK: Final = 10
"""Grey value (of 255) that 1 % of the pixels must exceed."""
LEAST_CONTRAST: Final = 20
"""Grey values (of 255) between the 1 % and the 99 % quantile."""
INVERTED: Final = 0.35
"""`inversion_score` of a negative."""
_LOOKED_AT: Final = 256
_GRID: Final = 64


class Rule(StrEnum):
    """Why a readable picture is not answered."""

    TOO_SMALL = "too-small"
    EXTREME_ASPECT = "extreme-aspect"
    BLACK = "black"
    CONSTANT = "constant"
    LOW_CONTRAST = "low-contrast"
    COLOURED = "coloured"
    INVERTED = "inverted"
    UNLIKE_REFERENCE = "unlike-reference"
    """Only with `predict --reference`: `client.prediction.reference`."""


@dataclass(frozen=True)
class Doubt:
    """A rule that a picture breaks."""

    rule: Rule
    words: str
    """What is wrong, for a person."""


def find_doubt(
    picture: Picture, preprocessing: Preprocessing, *, without: frozenset[Rule] = frozenset()
) -> Doubt | None:
    """The first rule, in the order of `Rule`, that an upright picture breaks; `without` are not looked at."""
    for doubt in _doubts(picture, preprocessing):
        if doubt.rule not in without:
            return doubt
    return None


def _doubts(picture: Picture, preprocessing: Preprocessing) -> list[Doubt]:
    full = eight_bits(picture)
    height, width = full.shape[:2]
    small = _reduced(full)
    grey = small if small.ndim == 2 else np.asarray(Image.fromarray(small).convert("L"))
    shape = [rule for rule in (_size(height, width, preprocessing), _aspect(height, width)) if rule]
    found = shape + [rule for rule in (_flat(grey),) if rule]
    if preprocessing.channels == 1:
        # What hangs before a light box is grey; a colour model's pictures have no rule for light and dark.
        found += [rule for rule in (_colour(small), _inversion(grey)) if rule]
    return found


def doubt_of_shades(grey: NDArray[np.uint8]) -> Doubt | None:
    """The first of the rules that need nothing but a grey picture (H, W) of any size: flat, then inverted."""
    return _flat(grey) or _inversion(grey)


def _reduced(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Averaged to at most `_LOOKED_AT` pixels a side: the rules are about the picture, not about noise."""
    factor = max(1, -(-min(pixels.shape[:2]) // _LOOKED_AT))
    return np.asarray(Image.fromarray(pixels).reduce(factor)) if factor > 1 else pixels


def _size(height: int, width: int, preprocessing: Preprocessing) -> Doubt | None:
    side = preprocessing.image_size
    if min(height, width) >= LEAST_SHARE_OF_SIZE * side:
        return None
    return Doubt(
        Rule.TOO_SMALL, f"{width} x {height} pixels, and the model was trained on {side} x {side}: too small"
    )


def _aspect(height: int, width: int) -> Doubt | None:
    if max(height, width) <= MOST_ASPECT * min(height, width):
        return None
    return Doubt(Rule.EXTREME_ASPECT, f"{width} x {height} pixels: a strip, not a film")


def _flat(grey: NDArray[np.uint8]) -> Doubt | None:
    low, high = np.quantile(grey, (0.01, 0.99))
    if high < BLACK:
        return Doubt(Rule.BLACK, "the picture is black")
    if int(grey.max()) - int(grey.min()) <= 2:
        return Doubt(Rule.CONSTANT, "the picture has one shade everywhere")
    if high - low < LEAST_CONTRAST:
        return Doubt(Rule.LOW_CONTRAST, f"almost no contrast: {high - low:.0f} of 255 shades")
    return None


def _colour(small: NDArray[np.uint8]) -> Doubt | None:
    if small.ndim == 2:
        return None
    share = coloured_share(small, white=255)
    if share <= COLOURED_SHARE:
        return None
    return Doubt(Rule.COLOURED, f"{share:.0%} of the picture is coloured, and the model knows grey films")


def _inversion(grey: NDArray[np.uint8]) -> Doubt | None:
    if inversion_score(grey) <= INVERTED:
        return None
    return Doubt(Rule.INVERTED, "light and dark look exchanged: air is bright, bone is dark")


def inversion_score(grey: NDArray[Any]) -> float:
    """How much a grey picture (H, W) looks like a negative, about -3 to 3; its negative scores the opposite.

    Twice (the fields of the lungs less the spine between them), plus how bright the corners are where air is
    beside the patient: the upper two, and the median of all four. Shades from the 1 % to the 99 % quantile.
    """
    low, high = np.quantile(grey, (0.01, 0.99))
    plane = Image.fromarray(np.ascontiguousarray(grey, dtype=np.uint8)).resize(
        (_GRID, _GRID), Image.Resampling.BILINEAR
    )
    shades = np.clip((np.asarray(plane, np.float64) - low) / max(high - low, 1.0), 0, 1)
    spine = shades[13:45, 28:36].mean()
    lungs = (shades[13:42, 12:22].mean() + shades[13:42, 42:52].mean()) / 2
    corners = [shades[rows, columns].mean() for rows in _ENDS for columns in _ENDS]
    upper, all_four = np.mean(corners[:2]) - 0.5, np.median(corners) - 0.5
    return float(2 * (lungs - spine) + upper + all_four)


_ENDS: Final = (slice(0, 8), slice(_GRID - 8, _GRID))
