"""What is written about one picture: a PNG with its heat map, and a page that prints on one or two sheets.

Only the pixels of a picture go on a page, never a word from its header; and the file's name as it was typed.
"""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from client.prediction.answers import Answer
from client.prediction.ensemble import Ensemble
from client.prediction.heat_map import overlay
from client.prediction.inputs import Input
from client.prediction.passport import RESEARCH_ONLY, limits, passport
from client.prediction.stored_model import StoredModel
from common.errors import ConfigError
from common.files import write_bytes_atomically
from common.pages.document import Plot, document, images
from common.pages.html import Html, figure, section, table, tag

_LONGEST_STEM = 60


def refuse_beside_images(folder: Path, inputs: Sequence[Input], named: Sequence[Path]) -> None:
    """Raise ConfigError for a folder of results among the images, where the next reading would find them."""
    wanted = os.path.realpath(folder)
    around = {os.path.dirname(asked.path) for asked in inputs}
    trees = [os.path.realpath(path) for path in named if path.is_dir()]
    if wanted in around or any(wanted == tree or wanted.startswith(tree + os.sep) for tree in trees):
        raise ConfigError(
            f"{folder} lies among the images",
            why="results beside images would be taken for images later",
            fix="name a folder elsewhere",
        )


def write_heat_map(folder: Path, number: int, answer: Answer) -> Path | None:
    """Write the picture with its heat as PNG; None where there is no heat."""
    if answer.heat is None or answer.picture is None:
        return None
    path = folder / f"{_stem(number, answer)}.png"
    write_bytes_atomically(path, _png(overlay(answer.picture, answer.heat)))
    return path


def write_page(folder: Path, number: int, answer: Answer, stored: StoredModel | Ensemble) -> Path:
    """Write the page of one picture."""
    path = folder / f"{_stem(number, answer)}.html"
    write_bytes_atomically(path, case_page(answer, stored).encode())
    return path


def case_page(answer: Answer, stored: StoredModel | Ensemble) -> str:
    """One picture's page: the answer or why there is none, picture, heat, numbers, the model's passport."""
    facts = [*passport(stored)]
    return document(
        f"{answer.name}: {answer.decision or 'not answered'}",
        tag("header", tag("h1", answer.name), tag("p", RESEARCH_ONLY, class_="soft")),
        _banner(answer, stored),
        _pictures(answer),
        _numbers(answer),
        section("The model", "passport", table("Passport", ("what", "stated"), facts)),
        section("Limits", "limits", tag("ul", *(tag("li", line) for line in limits(stored)))),
    )


def _banner(answer: Answer, stored: StoredModel | Ensemble) -> Html:
    if answer.probabilities is None:
        words = [tag("strong", f"Not answered: {answer.reason}"), tag("p", answer.words)]
        return tag("div", *words, class_="banner not-private plain", role="note")
    share = answer.probabilities.get(answer.decision)
    stated = "" if share is None else f" (probability {figure(share)})"
    words = [
        tag("strong", f"{answer.decision}{stated}"),
        tag("p", f"Decided by: {stored.rule}."),
    ]
    return tag("div", *words, class_="banner", role="note")


def _pictures(answer: Answer) -> Html:
    if answer.picture is None:
        return Html("")
    plots = [Plot(name="picture", title="The picture as read", alt="The picture.", png=_png(answer.picture))]
    if answer.heat is not None:
        title = f"Where the model saw what speaks for {answer.explained} (red: most of this picture)"
        if not answer.heat.any():
            title = f"Nothing in the picture spoke for {answer.explained}"
        png = _png(overlay(answer.picture, answer.heat))
        plots.append(Plot(name="heat", title=title, alt=f"The picture with a heat map. {title}.", png=png))
    return section("Picture", "picture", images(plots))


def _numbers(answer: Answer) -> Html:
    if answer.probabilities is None:
        return Html("")
    better = answer.calibrated or {}
    rows = [(name, figure(value)) for name, value in answer.probabilities.items()]
    rows += [(f"{name}, calibrated on noised counts", figure(value)) for name, value in better.items()]
    seen = ""
    if answer.observed is not None:
        seen = (
            f"Of the validation patients whom the model gave a like probability, {answer.observed:.0%} had "
            "the finding (from noised counts)."
        )
    caption = "Probability of each class, as the model states it"
    return section("Numbers", "numbers", table(caption, ("class", "probability"), rows), tag("p", seen))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # A copy of the pixels alone: whatever a reader hung on the image stays behind.
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    bare.save(buffer, format="PNG")
    return buffer.getvalue()


def _stem(number: int, answer: Answer) -> str:
    """Number and name: safe in any file system, and different for different pictures."""
    stem = os.path.splitext(os.path.basename(answer.name))[0]
    return f"{number:04d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)[:_LONGEST_STEM].strip('_') or 'image'}"
