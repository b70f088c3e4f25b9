"""A simulated hospital's part (`client.images.parts`) that holds series: read as it was written."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from client.images.decoded import DecodedRecords
from client.images.parts import is_part, mapped_images
from client.images.splits import SPLITS, split_named
from common.errors import DataError
from common.examples import Examples, concatenate
from common.preprocessing import Preprocessing
from common.series import IMAGE, PRESENT, YEARS
from common.series_form import SeriesForm

_FIX: Final = "prepare the run again"


def read_series_part(
    path: Path, *, preprocessing: Preprocessing, classes: Sequence[str] | None, form: SeriesForm
) -> DecodedRecords | None:
    """The series of a part, mapped from the file; None for any other data.

    Raises DataError for a part that is damaged or made for another run.
    """
    names = _names(path)
    if not is_part(names) or not any(name.endswith(f"_{PRESENT}") for name in names):
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            mapped = mapped_images(path)
            arrays = {name: mapped[name] if name in mapped else archive[name] for name in archive.files}
        return _decoded(path, arrays, preprocessing, classes, form)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read", why=str(error), fix=_FIX) from None


def _names(path: Path) -> list[str]:
    """Names of the arrays of an `.npz`; none for another file."""
    if path.suffix != ".npz" or not path.is_file():
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile):
        return []


def _decoded(
    path: Path,
    arrays: dict[str, NDArray[Any]],
    preprocessing: Preprocessing,
    classes: Sequence[str] | None,
    form: SeriesForm,
) -> DecodedRecords:
    own = tuple(arrays["classes"].tolist())
    side = preprocessing.image_size
    wanted = (form.steps, preprocessing.channels, side, side)
    tables, splits = [], []
    for prefix in ("train", "val", "test"):
        images = arrays.get(f"{prefix}_images")
        if images is None:
            continue
        if images.dtype != np.uint8 or images.shape[1:] != wanted or own != tuple(classes or own):
            raise DataError(
                f"{path} was made for another run",
                why=f"its series are {images.shape[1:]} of {', '.join(own)}, the run's are {wanted}",
                fix=_FIX,
            )
        patients = arrays[f"{prefix}_patients"].tolist()
        number_of = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
        tables.append(
            Examples(
                inputs={
                    IMAGE: images,
                    PRESENT: arrays[f"{prefix}_{PRESENT}"],
                    YEARS: arrays[f"{prefix}_{YEARS}"],
                },
                targets=arrays[f"{prefix}_labels"].astype(np.int64),
                units=np.array([number_of[patient] for patient in patients], np.int64),
                unit_ids=tuple(number_of),
            )
        )
        splits += [split_named(prefix) or SPLITS[0]] * len(number_of)
    examples = tables[0] if len(tables) == 1 else concatenate(tables)
    if len(splits) != examples.num_units:
        raise DataError(f"{path} has a patient in two splits", fix=_FIX)
    return DecodedRecords(
        examples=examples,
        classes=own,
        unit="image" if str(arrays["unit"]) == "image" else "patient",
        unit_splits=tuple(splits),
        groups={},
        skipped=(),
        units_in_several_splits=0,
        repeated_images=0,
        layout=form.words,
    )
