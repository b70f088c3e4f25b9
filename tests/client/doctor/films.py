"""Chest films that a program draws, each unlike the others, and folders and manifests of them."""

import csv
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from client.doctor.checkup import Checkup, check_images
from client.images.phantoms import hospital_phantoms
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing
from tests.client.images.medical_files import dicom

SIZE = 64
CLASSES = ("normal", "ill")


@lru_cache(maxsize=1)
def _phantoms() -> np.ndarray:
    return hospital_phantoms(hospital=1, num_patients=150, image_size=SIZE, seed=3).images


def film(number: int) -> np.ndarray:
    """(64, 64) uint8: a phantom with markings of its own, as vessels are."""
    phantoms = _phantoms()
    coarse = np.random.default_rng(number).normal(0, 1, (17, 17)).astype(np.float32)
    marks = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return np.clip(phantoms[number % len(phantoms)] * 0.8 + 20 + 12 * marks, 0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    """A picture in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def save_dicom(path: Path, pixels: np.ndarray, **elements) -> Path:
    """A DICOM file with these elements."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dicom(pixels, **elements))
    return path


def write_table(folder: Path, rows: list[dict[str, str]]) -> Path:
    """`films.csv`: each row's own columns, blank where it has none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "films.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return folder / "films.csv"


def sound(folder: Path, count: int = 60, **more: str) -> list[dict[str, str]]:
    """Rows of `count` sound films, one for each patient, which are drawn."""
    rows = []
    for number in range(count):
        save(folder / f"{number}.png", film(number))
        split = "test" if number % 5 == 4 else "train"
        label = CLASSES[number // 2 % 2]
        rows.append(
            {"path": f"{number}.png", "label": label, "patient": f"p{number}", "split": split, **more}
        )
    return rows


def checkup(path: Path, *, classes=CLASSES, cache=None, size=SIZE, channels=1, **settings) -> Checkup:
    """What the doctor says."""
    return check_images(
        DataConfig(path=str(path), **settings),
        preprocessing=Preprocessing(image_size=size, channels=channels),
        classes=classes,
        cache_folder=cache,
    )


def by_name(found: Checkup) -> dict:
    """Findings by name."""
    return {finding.name: finding for finding in found.findings()}
