"""What a person names on the command line, as single pictures: files, folders of files, DICOM series."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.images.content import HEAD_BYTES, Format, format_of
from client.images.decode import DataFolder, read_content
from client.images.folders import files_below, may_be_image
from client.images.formats import most_bytes
from client.images.records import SkipReason, Unusable
from common.errors import ConfigError, printable

_LONGEST_NAME = 400


@dataclass(frozen=True)
class Input:
    """One picture to be answered."""

    name: str
    """As the person named it, fit for a terminal."""
    path: str
    """Resolved: a file, or the folder of a series."""
    reason: SkipReason | None = None
    """Why it cannot even be looked for."""


def find_inputs(named: Sequence[Path], *, max_pixels: int) -> list[Input]:
    """The pictures of files and folders, in the order given and sorted inside folders.

    A folder whose DICOM pictures are slices of one series is one picture (docs/formats.md says which); in
    other folders, at any depth, every file that may be an image is one. Raises ConfigError for none at all.
    """
    found: list[Input] = []
    for path in named:
        if path.is_dir():
            found += _of_folder(path, max_pixels)
        else:
            found.append(Input(_name(str(path)), os.path.realpath(path)))
    if not found:
        raise ConfigError(
            "there is no image to answer",
            why=f"{', '.join(_name(str(path)) for path in named)}: no file in it looks like one",
            fix="name image files, folders of them or folders of DICOM slices",
        )
    return found


def _of_folder(folder: Path, max_pixels: int) -> list[Input]:
    root = os.path.realpath(folder)
    inside = DataFolder(Path(root))
    of_parent: dict[str, list[str]] = {}
    for path in files_below(Path(root)):
        of_parent.setdefault(os.path.dirname(path), []).append(path)
    found: list[Input] = []
    for parent, paths in of_parent.items():
        slices = _one_series(paths, max_pixels)
        if slices:
            found.append(Input(_named_below(folder, root, parent), parent))
        for path in paths:
            if path not in slices and not os.path.isdir(path) and may_be_image(path):
                found.append(_located(inside, path, _named_below(folder, root, path)))
    return found


def _located(inside: DataFolder, path: str, name: str) -> Input:
    try:
        return Input(name, inside.locate(path))
    except Unusable as unusable:
        return Input(name, path, unusable.reason)


def _one_series(paths: Sequence[str], max_pixels: int) -> set[str]:
    """The DICOM files of a folder whose pictures all lie at a place in one series; else none of them."""
    dicom = [path for path in paths if _is_dicom(path)]
    if len(dicom) < 2:
        return set()
    from client.images.dicom_file import parse_dicom
    from client.images.series import slice_of

    series: list[str] = []
    for path in dicom:
        try:
            content = read_content(path, max_pixels=max_pixels)
            found = slice_of(path, parse_dicom(content, max_bytes=most_bytes(max_pixels)))
        except Unusable:
            return set()
        except Exception:  # damaged files make the parser raise almost anything; the reader names it
            continue
        series += [] if found is None else [found.series]
    return set(dicom) if len(series) > 1 and len(set(series)) == 1 else set()


def _is_dicom(path: str) -> bool:
    if os.path.islink(path) or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return format_of(file.read(HEAD_BYTES)) is Format.DICOM
    except OSError:
        return False


def _named_below(folder: Path, root: str, path: str) -> str:
    return _name(os.path.join(str(folder), os.path.relpath(path, root)) if path != root else str(folder))


def _name(path: str) -> str:
    return printable(path, most=_LONGEST_NAME)
