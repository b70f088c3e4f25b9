"""A contact sheet: some of a hospital's images before and after preprocessing, on one offline page.

It is for a person who sees at a glance what no check finds: films that lie on their side or are inverted,
burnt-in names, a crop that cuts the finding away. It holds patients' pictures and names of files: it is
written for the owner only, outside of the images, and nothing of it goes anywhere.
"""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.images.dataset import read_records
from client.images.decode import fit, guarded_pillow
from client.images.entries import read_entry
from client.images.records import ImageArray, Records, SkippedImage, SkipReason, Unusable
from common.errors import ConfigError
from common.files import write_bytes_atomically
from common.hospital_config import DataConfig
from common.pages.document import Plot, document, images
from common.pages.html import Html, section, table, tag
from common.preparation.settings import AS_INSTALLED
from common.preprocessing import Picture, Preprocessing, eight_bits
from common.settings import to_nested
from common.task_kinds import CLASSIFICATION

SHOWN: Final = 24
"""Images on a sheet."""
SIDE: Final = 224
"""Pixels along each of the two pictures of an image."""
_GAP: Final = 8
WARNING: Final = (
    "Patient data: pictures of patients and names of files. It stays in this hospital; delete it when seen."
)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Shown:
    """One image of a sheet."""

    name: str
    label: str
    before: NDArray[np.uint8] | None
    """As a viewer shows it, (H, W) or (H, W, 3); None where it could not be read."""
    after: NDArray[np.uint8] | None
    """As the model sees it, (channels, size, size); None where it cannot be prepared."""
    reason: SkipReason | None
    """Why one of them is missing."""


def write_contact_sheet(
    path: Path,
    data: DataConfig,
    *,
    preprocessing: Preprocessing,
    classes: Sequence[str] | None,
    task: str = CLASSIFICATION,
) -> int:
    """Write the page (0600) and return how many images are on it. Raises ConfigError, DataError."""
    _refuse_among_images(path, data)
    records = read_records(data.model_copy(update={"max_skipped_share": 1.0}), classes=classes, task=task)
    shown = list(chosen(records, preprocessing, max_pixels=data.max_pixels))
    page = contact_sheet(shown, records, preprocessing)
    try:
        write_bytes_atomically(path, page.encode(), mode=0o600)
    except OSError as error:
        raise ConfigError(
            f"the contact sheet {path} cannot be written", why=str(error), fix="name another file"
        ) from None
    return len(shown)


def chosen(records: Records, preprocessing: Preprocessing, *, max_pixels: int) -> Iterator[Shown]:
    """Images of each class, spread over the data: the same ones each time."""
    with guarded_pillow(max_pixels):
        for row in _rows(records.labels):
            yield _looked_at(records, row, preprocessing, max_pixels)


def contact_sheet(shown: Sequence[Shown], records: Records, preprocessing: Preprocessing) -> str:
    """The page."""
    as_installed = to_nested(AS_INSTALLED)
    own = to_nested(preprocessing.steps).items()
    steps = [(key, str(value)) for key, value in own if value != as_installed[key]]
    size = f"{preprocessing.image_size} x {preprocessing.image_size} pixels"
    facts = [
        ("The model sees", f"{size}, {'grey' if preprocessing.channels == 1 else 'colour'}"),
        ("Images", f"{len(shown)} of {len(records)}, some of each class, evenly over the data"),
        *(steps or [("Steps", "as installed")]),
    ]
    look = (
        "Left: the image as a viewer shows it. Right: what the model sees. Look for films that lie on their "
        "side, are mirrored or inverted, and for names burnt into the picture."
    )
    return document(
        "Contact sheet",
        tag("header", tag("h1", "Contact sheet"), tag("p", look, class_="soft")),
        tag("div", tag("strong", WARNING), class_="banner not-private plain", role="note"),
        section("Preprocessing", "preprocessing", table("What is done", ("what", "how"), facts)),
        section("Images", "images", images(_plots(shown))),
        _left_out(shown, records.skipped),
    )


def _rows(labels: Sequence[str]) -> list[int]:
    """At most SHOWN rows, as many of each label as of another while there are any, each evenly spread."""
    of_label: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        of_label.setdefault(label, []).append(row)
    left, found = SHOWN, []
    for number, rows in enumerate(sorted(of_label.values(), key=len)):
        share = min(len(rows), left // (len(of_label) - number))
        places = np.unique(np.linspace(0, len(rows) - 1, share).astype(np.int64)).tolist()
        found += [rows[place] for place in places]
        left -= len(places)
    return sorted(found)


def _looked_at(records: Records, row: int, preprocessing: Preprocessing, max_pixels: int) -> Shown:
    source = records.source
    before = after = None
    reason = None
    try:
        picture: Picture
        if isinstance(source, ImageArray):
            picture = Image.fromarray(source.pixels[row])
        else:
            picture = read_entry(source.paths[row], source.view(row), max_pixels=max_pixels)
        before = eight_bits(picture)
        after = fit(picture, preprocessing)
    except Unusable as unusable:
        reason = unusable.reason
    return Shown(name=source.name(row), label=records.labels[row], before=before, after=after, reason=reason)


def _plots(shown: Sequence[Shown]) -> Iterator[Plot]:
    for number, image in enumerate(shown, start=1):
        if image.before is None:
            continue
        height, width = image.before.shape[:2]
        words = f"{image.name} ({image.label}, {width} x {height})"
        if image.reason is not None:
            words += f". Not used: {image.reason}"
        yield Plot(
            name=f"image-{number}", title=words, alt=f"Before and after: {words}", png=_png(_pair(image))
        )


def _left_out(shown: Sequence[Shown], skipped: Sequence[SkippedImage]) -> Html:
    refused = [(image.name, image.reason) for image in shown if image.reason is not None]
    refused += [(entry.path, entry.reason) for entry in skipped[: SHOWN - len(refused)]]
    rows = [(name, f"{reason}: {reason.remedy}") for name, reason in refused]
    return section("Not used", "not-used", table("And why", ("file", "why"), rows)) if rows else Html("")


def _pair(image: Shown) -> Image.Image:
    """Both pictures side by side on grey; a missing one stays empty."""
    sheet = Image.new("RGB", (2 * SIDE + _GAP, SIDE), (128, 136, 144))
    for place, pixels in enumerate((image.before, image.after)):
        if pixels is None:
            continue
        shown = pixels if place == 0 else pixels.transpose(1, 2, 0).squeeze()
        picture = Image.fromarray(np.ascontiguousarray(shown)).convert("RGB")
        share = SIDE / max(picture.size)
        size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
        enlarged = Image.Resampling.NEAREST if share > 1 else Image.Resampling.BILINEAR
        picture = picture.resize(size, enlarged)
        sheet.paste(picture, (place * (SIDE + _GAP) + (SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return sheet


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _refuse_among_images(path: Path, data: DataConfig) -> None:
    """Raise ConfigError for a page where the next reading would look for images."""
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise ConfigError(f"{path} is a folder", fix="name a file, such as sheet.html")
    named = [os.path.realpath(root) for root in (data.path, data.path_root) if root]
    # Of a table the folder counts, since it may name any file there; an .npz is one file.
    roots = [root if os.path.isdir(root) else os.path.dirname(root) for root in named if not _is_zip(root)]
    if target in named or any(target.startswith(os.path.join(root, "")) for root in roots):
        raise ConfigError(
            f"{path} lies among the images",
            why="pictures of patients would be copied beside those that are read next time",
            fix="name a file elsewhere on this machine",
        )


def _is_zip(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"PK"
    except OSError:
        return False
