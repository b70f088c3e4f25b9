"""Small pictures whose content is known, and a reader with the usual settings."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.images.dataset import read_hospital_images
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing

SIZE = 12


def _pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)


@pytest.fixture
def pixels():
    """Picture number n, (12, 12) uint8, different for each n."""
    return _pixels


@pytest.fixture
def draw():
    """Write picture number n losslessly; the folder is made. Returns the path."""

    def write(path: Path, number: int, *, format: str = "PNG") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_pixels(number)).save(path, format=format)
        return path

    return write


@pytest.fixture
def read():
    """Read data at the pictures' own size; settings of DataConfig and of the reader by name."""

    def reader(path, *, classes=None, cache=None, key=b"", size=SIZE, channels=1, **settings):
        return read_hospital_images(
            DataConfig(path=str(path), **settings),
            preprocessing=Preprocessing(image_size=size, channels=channels),
            classes=classes,
            cache_folder=cache,
            split_key=key,
        )

    return reader


@pytest.fixture
def manifest(tmp_path, draw):
    """Write `data/scans.csv` with these rows and a picture for each first value not there yet."""

    def write(header, rows, *, delimiter=",", encoding="utf-8"):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        lines = [delimiter.join(header), *(delimiter.join(row) for row in rows)]
        (folder / "scans.csv").write_text("\n".join(lines) + "\n", encoding=encoding)
        for number, row in enumerate(rows):
            inside = row[0] and ".." not in row[0] and not row[0].startswith(("/", "missing"))
            if inside and not (folder / row[0]).exists():
                draw(folder / row[0], number)
        return folder / "scans.csv"

    return write
