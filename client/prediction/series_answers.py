"""Answers about series: every step is read and looked at with the rules, the series is scored as a whole."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from client.images.decode import guarded_pillow
from client.images.entries import read_entry
from client.images.records import Unusable
from client.prediction.doubts import Rule, find_doubt
from client.prediction.series_inputs import SeriesInput
from client.prediction.stored_model import StoredModel
from common.errors import ModelError
from common.preprocessing import Picture
from common.scoring import input_probabilities
from common.series import IMAGE, PRESENT, YEARS


class NotAnswered(Exception):  # noqa: N818 - an answer about one series
    """A series that is not answered: the name of the reason, and words for a person."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(reason)
        self.reason, self.words = reason, words


def refuse_heat(stored: StoredModel) -> None:
    """Raise ModelError where a heat map is asked of a model of series."""
    if stored.form.is_series:
        raise ModelError(
            "a model of series has no heat map",
            why="an answer rests on all steps, and a map of one of them would hide the others",
            fix="leave out --heat-map",
        )


def series_said(
    stored: StoredModel, series: Sequence[SeriesInput], *, max_pixels: int, without: frozenset[Rule]
) -> Iterator[tuple[NDArray[np.float64], Picture] | NotAnswered]:
    """Probabilities (classes,) of each series and its last picture, or why there is no answer; in order."""
    for one in series:
        try:
            with guarded_pillow(max_pixels):
                pictures = _pictures(stored, one, max_pixels, without)
        except NotAnswered as refused:
            yield refused
            continue
        images = np.zeros(
            (1, stored.form.steps, *stored.preprocessing.fit(pictures[-1]).shape), dtype=np.uint8
        )
        present = np.zeros((1, stored.form.steps), np.float32)
        years = np.zeros_like(present)
        for place, (picture, step) in enumerate(zip(pictures, one.steps, strict=True)):
            images[0, place] = stored.preprocessing.fit(picture)
            present[0, place], years[0, place] = 1, step.years
        said = input_probabilities(
            stored.network,
            stored.task,
            {IMAGE: images, PRESENT: present, YEARS: years},
            preprocessing=stored.preprocessing,
        )
        yield said[0], pictures[-1]


def _pictures(
    stored: StoredModel, one: SeriesInput, max_pixels: int, without: frozenset[Rule]
) -> list[Picture]:
    """Every picture of a series. Raises NotAnswered: with a step missing it would be another series."""
    if one.reason is not None:
        raise NotAnswered(one.reason.value, one.reason.remedy)
    pictures: list[Picture] = []
    for number, step in enumerate(one.steps, start=1):
        where = f"step {number} of {len(one.steps)}, {os.path.basename(step.path)}{step.view.words}"
        try:
            picture = read_entry(step.path, step.view, max_pixels=max_pixels)
        except Unusable as unusable:
            raise NotAnswered(unusable.reason.value, f"{where}: {unusable.reason.remedy}") from None
        if doubt := find_doubt(picture, stored.preprocessing, without=without):
            raise NotAnswered(doubt.rule.value, f"{where}: {doubt.words}")
        pictures.append(picture)
    return pictures
