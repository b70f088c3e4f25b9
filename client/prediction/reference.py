"""Whether a picture is like the genuine ones of the place that asks: `predict --reference FOLDER`.

Fitted here, on this site's own images, and kept nowhere: nothing of it travels with a model, so nothing has
to be charged. What is compared are the first-order wavelet energies of the picture at 32 x 32 (its texture in
every direction at each of nine places) and its brightness on a grid; a picture is as strange as its distance
to its nearest neighbours among the references, and is flagged beyond nearly all references' own distances,
each measured with that reference left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.images.batch import on_all_cores
from client.images.decode import guarded_pillow
from client.images.entries import read_entry
from client.images.records import WHOLE, SkipReason, Unusable
from client.prediction.doubts import Doubt, Rule
from client.prediction.inputs import Input
from common.errors import ConfigError
from common.preprocessing import Picture, eight_bits

if TYPE_CHECKING:
    from common.models.wavelets import Scattering

SIDE: Final = 32
FEWEST: Final = 50
"""References below this number say too little about what is usual."""
QUANTILE: Final = 0.995
"""Of the references' own distances: about one genuine picture in 200 is flagged, more with few of them."""
NEIGHBOURS: Final = 3
_SCALES: Final = 3
_ANGLES: Final = 8
_GRID: Final = 8
_LEAST_SPREAD: Final = 1e-3
_Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Reference:
    """Genuine pictures as points, and how far apart they usually lie."""

    mean: _Floats
    spread: _Floats
    points: _Floats
    """(references, numbers), standardised."""
    limit: float
    """Distance beyond which a picture is flagged."""

    @classmethod
    def of(cls, pictures: Sequence[Picture]) -> "Reference":
        """Fit to genuine pictures. Raises ConfigError for fewer than FEWEST."""
        return cls.fitted(features(pictures))

    @classmethod
    def fitted(cls, found: _Floats) -> "Reference":
        """From what `features` gave. Raises ConfigError for fewer than FEWEST."""
        if len(found) < FEWEST:
            raise ConfigError(
                f"{len(found)} reference images are too few",
                why="what is usual cannot be told from them",
                fix=f"name a folder of at least {FEWEST} genuine images of this site",
            )
        mean, spread = found.mean(axis=0), found.std(axis=0) + _LEAST_SPREAD
        points = (found - mean) / spread
        own = _distances(points, points, leave_self_out=True)
        return cls(mean=mean, spread=spread, points=points, limit=float(np.quantile(own, QUANTILE)))

    def strangeness(self, found: _Floats) -> _Floats:
        """(rows,) distance as a multiple of the limit: above 1 is flagged."""
        return _distances((found - self.mean) / self.spread, self.points) / self.limit


def read_reference(inputs: Sequence[Input], *, max_pixels: int) -> Reference:
    """Fit to the readable pictures of `inputs`. Raises ConfigError for too few."""

    def plane(row: int) -> _Floats:
        if inputs[row].reason is not None:
            raise Unusable(inputs[row].reason or SkipReason.UNREADABLE)
        return _plane(read_entry(inputs[row].path, WHOLE, max_pixels=max_pixels))

    with guarded_pillow(max_pixels):
        found = [p for p in on_all_cores(plane, range(len(inputs))) if not isinstance(p, SkipReason)]
    return Reference.fitted(_features(np.stack(found)) if found else np.zeros((0, 0)))


def judged(picture: Picture, reference: Reference) -> Doubt | None:
    """The doubt about a picture that is stranger than nearly all references."""
    (strange,) = reference.strangeness(features([picture]))
    if strange <= 1:
        return None
    words = f"{strange:.1f} times as far from this site's reference images as these are from each other"
    return Doubt(Rule.UNLIKE_REFERENCE, f"{words}: another kind of picture, or another machine")


def features(pictures: Sequence[Picture]) -> _Floats:
    """(pictures, numbers): logarithms of wavelet energies, and brightness on a grid; no exposure."""
    planes = [_plane(picture) for picture in pictures]
    return _features(np.stack(planes)) if planes else np.zeros((0, 0))


@lru_cache(maxsize=1)
def _transform() -> "Scattering":
    from common.models.wavelets import Scattering

    return Scattering(SIDE, scales=_SCALES, angles=_ANGLES)


def _features(planes: _Floats) -> _Floats:
    """Of (pictures, SIDE, SIDE) shades."""
    import torch

    transform, kept = _transform(), 1 + _SCALES * _ANGLES
    rows = []
    with torch.inference_mode():
        for start in range(0, len(planes), 64):
            inputs = torch.from_numpy(planes[start : start + 64].astype(np.float32))
            waves = transform(inputs)[:, 1:kept]
            # 3 x 3 places of the grid, whatever it is: texture by region, not by pixel.
            places = torch.nn.functional.adaptive_avg_pool2d(waves, 3)
            rows.append(places.flatten(1).clamp_min(1e-3).log().numpy().astype(np.float64))
    cells = SIDE // _GRID
    grid = planes.reshape(-1, _GRID, cells, _GRID, cells).mean(axis=(2, 4)).reshape(len(planes), -1)
    textures = np.concatenate(rows)
    # Either kind weighs as much as the other, though one has more numbers.
    return np.concatenate([textures * (grid.shape[1] / textures.shape[1]) ** 0.5, grid], axis=1)


def _plane(picture: Picture) -> _Floats:
    """(SIDE, SIDE) shades 0..1 from the 1 % to the 99 % quantile: exposure is not what is compared."""
    grey = Image.fromarray(eight_bits(picture)).convert("L")
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float64)
    low, high = np.quantile(small, (0.01, 0.99))
    return np.asarray(np.clip((small - low) / max(high - low, 1.0), 0, 1))


def _distances(asked: _Floats, points: _Floats, *, leave_self_out: bool = False) -> _Floats:
    """(rows,) mean distance to the nearest NEIGHBOURS of `points`."""
    found = []
    skip = int(leave_self_out)
    for start in range(0, len(asked), 256):
        part = asked[start : start + 256]
        squares = (part**2).sum(axis=1)[:, None] + (points**2).sum(axis=1) - 2 * part @ points.T
        nearest = np.partition(squares, NEIGHBOURS + skip - 1, axis=1)[:, : NEIGHBOURS + skip]
        nearest.sort(axis=1)
        found.append(np.sqrt(np.maximum(nearest[:, skip:], 0)).mean(axis=1))
    return np.concatenate(found) if found else np.zeros(0)
