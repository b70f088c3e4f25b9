"""Answers about pictures: read, looked at with the rules, prepared as at training, scored in batches."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.images.batch import on_all_cores
from client.images.decode import guarded_pillow
from client.images.entries import read_entry
from client.images.records import WHOLE, SkipReason, Unusable
from client.prediction.decisions import decide as decide
from client.prediction.decisions import decisions, explained_classes
from client.prediction.doubts import Doubt, Rule, find_doubt
from client.prediction.inputs import Input
from client.prediction.stored_model import StoredModel
from common.preprocessing import Picture, eight_bits
from common.scoring import image_probabilities

SHOWN_SIDE = 512
"""Longer side of a picture on a page, in pixels."""
_ROWS_PER_CORE = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What is said about one picture."""

    name: str
    probabilities: Mapping[str, float] | None
    """By class; None where the picture is not answered."""
    decision: str = ""
    reason: str = ""
    """Name of the reason why it is not answered; empty where it is."""
    words: str = ""
    """The same for a person, with what to do."""
    observed: float | None = None
    """Share of validation patients with the finding among those whom the model gave a like probability."""
    picture: Image.Image | None = None
    """To be shown, where asked for and readable."""
    heat: NDArray[np.float32] | None = None
    """(h, w) from 0 to 1, where asked for."""
    explained: str = ""
    """The class that the heat speaks for."""

    @property
    def is_answered(self) -> bool:
        """Whether there is a decision."""
        return self.probabilities is not None


class _Read(NamedTuple):
    """A picture that could be decoded."""

    pixels: NDArray[np.uint8] | None
    doubt: Doubt | None
    picture: Image.Image | None


def answers(
    stored: StoredModel,
    inputs: Sequence[Input],
    *,
    max_pixels: int,
    without: frozenset[Rule] = frozenset(),
    with_pictures: bool = False,
    with_heat: bool = False,
) -> Iterator[Answer]:
    """One answer per input, in order; memory holds a block of pictures at a time.

    Raises ModelError where heat is asked of a model without maps.
    """
    block = _ROWS_PER_CORE * len(os.sched_getaffinity(0))
    for start in range(0, len(inputs), block):
        part = inputs[start : start + block]

        def read(row: int, part: Sequence[Input] = part) -> _Read:
            return _read(stored, part[row], max_pixels, without, with_pictures or with_heat)

        with guarded_pillow(max_pixels):
            outcomes = list(on_all_cores(read, range(len(part))))
        yield from _answered(stored, part, outcomes, with_heat)


def _read(
    stored: StoredModel, asked: Input, max_pixels: int, without: frozenset[Rule], with_picture: bool
) -> _Read:
    if asked.reason is not None:
        raise Unusable(asked.reason)
    picture = read_entry(asked.path, WHOLE, max_pixels=max_pixels)
    doubt = find_doubt(picture, stored.preprocessing, without=without)
    shown = _shown(picture) if with_picture else None
    return _Read(None if doubt else stored.preprocessing.fit(picture), doubt, shown)


def _shown(picture: Picture) -> Image.Image:
    image = Image.fromarray(eight_bits(picture))
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return image


def _answered(
    stored: StoredModel, part: Sequence[Input], outcomes: Sequence[_Read | SkipReason], with_heat: bool
) -> Iterator[Answer]:
    rows = [row for row, read in enumerate(outcomes) if not isinstance(read, SkipReason) and not read.doubt]
    found = [read.pixels for read in outcomes if not isinstance(read, SkipReason) and read.pixels is not None]
    side, channels = stored.preprocessing.image_size, stored.preprocessing.channels
    images = np.stack(found) if found else np.zeros((0, channels, side, side), np.uint8)
    said = image_probabilities(stored.network, stored.task, images, preprocessing=stored.preprocessing)
    decided = decisions(stored.task, said, threshold=stored.threshold, thresholds=stored.thresholds)
    explained = explained_classes(stored.task, said)
    heat = _heat(stored, images, explained) if with_heat else None
    place_of = {row: place for place, row in enumerate(rows)}
    for row, (asked, read) in enumerate(zip(part, outcomes, strict=True)):
        if isinstance(read, SkipReason):
            yield _refused(asked, read.value, read.remedy)
        elif read.doubt is not None:
            yield _refused(asked, read.doubt.rule.value, read.doubt.words, read.picture)
        elif not np.isfinite(said[place_of[row]]).all():
            yield _refused(asked, "no-number", "the model's answer is no number: it diverged", read.picture)
        else:
            place = place_of[row]
            yield Answer(
                name=asked.name,
                probabilities=dict(zip(stored.task.classes, said[place].tolist(), strict=True)),
                decision=decided[place],
                observed=_observed(stored.description, said[place]),
                picture=read.picture,
                heat=None if heat is None else heat[place],
                explained="" if heat is None else stored.task.classes[explained[place]],
            )


def _heat(stored: StoredModel, images: NDArray[np.uint8], classes: NDArray[np.int64]) -> NDArray[np.float32]:
    from client.prediction.heat_map import heat_maps
    from client.prediction.task_scores import ScoreOfEach, stands_alone

    return heat_maps(
        ScoreOfEach(stored.network, stored.task.name).eval(),
        images,
        classes,
        preprocessing=stored.preprocessing,
        against_others=not stands_alone(stored.task),
    )


def _refused(asked: Input, reason: str, words: str, picture: Image.Image | None = None) -> Answer:
    return Answer(name=asked.name, probabilities=None, reason=reason, words=words, picture=picture)


def _observed(description: Mapping[str, Any], said: NDArray[np.float64]) -> float | None:
    """Share with the finding among like validation patients, by the noised counts that the model has."""
    for place in description.get("calibration") or ():
        upper = place["upper"]
        if place["lower"] <= said[1] < upper or (upper >= 1 and said[1] >= upper):
            return None if place["observed"] is None else float(place["observed"])
    return None
