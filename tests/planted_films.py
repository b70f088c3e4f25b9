"""Films with a name planted wherever a hospital may have one, and a search that finds it in any disguise."""

import base64
import csv
import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

NAME = "CANARY-DOE^JOHN"
_NEEDLE = "CANARY"
SIZE = 28
CLASSES = ("normal", "opacity")


def film(number: int, *, label: int) -> np.ndarray:
    """(28, 28) uint8: noise, and a bright disc where something was found."""
    pixels = np.random.default_rng([number, label]).integers(40, 120, (SIZE, SIZE))
    rows, columns = np.mgrid[:SIZE, :SIZE]
    middle = 8 + number % 12
    pixels[(rows - middle) ** 2 + (columns - 14) ** 2 < 30] += 110 * label
    return pixels.astype(np.uint8)


def write_table(
    folder: Path,
    *,
    patients: Mapping[str, int],
    validation: Mapping[str, int] | None = None,
    test_patients: int = 12,
) -> Path:
    """A CSV of `patients` training patients per site, every third with two films, names in every column."""
    rows, number = [], 0
    for site, trained in patients.items():
        validates = (validation or {}).get(site, 0)
        for patient in range(trained + validates + test_patients):
            for view in range(2 if patient % 3 == 0 else 1):
                number += 1
                path = f"{NAME}/{site} {NAME} {patient}-{view}.png"
                _write(folder / path, film(number, label=patient % 2))
                split = "train" if patient < trained else "val" if patient < trained + validates else "test"
                who = f"{NAME}-{site}-{patient}"
                rows.append((path, CLASSES[patient % 2], who, split, site, f"Dr {NAME}", f"{NAME}-{view}"))
    broken = folder / NAME / f"{NAME} broken.png"
    broken.write_bytes(b"\x89PNG" + NAME.encode())
    missing = f"{NAME}/{NAME} missing.png"
    for path in (broken.relative_to(folder).as_posix(), missing):
        rows.append((path, CLASSES[0], f"{NAME}-broken", "train", next(iter(patients)), NAME, NAME))
    table = folder / "films.csv"
    with table.open("w", newline="") as file:
        header = ("path", "label", "patient", "split", "site", "physician", f"note of {NAME}")
        csv.writer(file).writerows([header, *rows])
    return table


def write_folders(folder: Path, *, images: int) -> Path:
    """`class/*.png` with names of patients, and a broken film among them."""
    for number in range(images):
        _write(folder / CLASSES[number % 2] / f"{NAME} {number}.png", film(number, label=number % 2))
    (folder / CLASSES[0] / f"{NAME} broken.png").write_bytes(b"no film of " + NAME.encode())
    return folder


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _disguises() -> list[bytes]:
    encodings = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    # Three alignments of base64; the first and last characters depend on the neighbours.
    shifted = [base64.b64encode(b" " * shift + _NEEDLE.encode() * 2)[4:-4] for shift in range(3)]
    plain = [_NEEDLE.encode(encoding) for encoding in encodings]
    return [*plain, *shifted, _NEEDLE.encode().hex().encode(), _NEEDLE.lower().encode()]


_DISGUISES = _disguises()


def names_it(content: bytes) -> bool:
    """Whether the planted name is in `content`, whatever the text encoding; archives are opened."""
    if any(disguise in content for disguise in _DISGUISES):
        return True
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(_NEEDLE in name or names_it(archive.read(name)) for name in archive.namelist())
    if content.startswith(b"\x89PNG"):
        with Image.open(io.BytesIO(content)) as image:
            return any(_NEEDLE in f"{key} {value}" for key, value in image.info.items())
    return False


def files_naming_it(folder: Path) -> Iterator[Path]:
    """Files and folders below `folder` whose name or content holds the planted name."""
    for path in sorted(folder.rglob("*")):
        if _NEEDLE in str(path.relative_to(folder)) or (path.is_file() and names_it(path.read_bytes())):
            yield path
