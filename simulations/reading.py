"""Read the images of a whole simulation, choosing size and channels that fit them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.images.dataset import read_records
from client.images.decode import guarded_pillow
from client.images.decoded import DecodedRecords, decode_records
from client.images.entries import read_entry
from client.images.findings import findings_in
from client.images.labels import classes_of, with_classes
from client.images.phantoms import CLASSES, hospital_phantoms
from client.images.records import ImageArray, ImageFiles, Records, Unusable, count_reasons
from common.errors import ConfigError
from common.examples import Examples, concatenate
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing
from common.task_kinds import CLASSIFICATION, MULTI_LABEL
from simulations.partition import FOLDERS_COLUMN, slug
from simulations.scenario import DEFAULT_HOSPITALS, Scenario

DEFAULT_IMAGE_SIZE = 64
PHANTOM_SIZE = 32
PHANTOM_PATIENTS = 400
"""Patients of each generated hospital."""
_LOOKED_AT = 24
_GREY_TOLERANCE = 16
_SAY_LITTLE = {"metadata", "labels", "data", "index", "images", "train", "manifest"}


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadImages:
    """All images of a simulation."""

    name: str
    decoded: DecodedRecords
    preprocessing: Preprocessing
    notes: tuple[str, ...]


def read_images(scenario: Scenario) -> ReadImages:
    """Read and decode, or generate. Raises ConfigError and DataError."""
    if scenario.generates_images:
        return _generate(scenario)
    data, classes = data_config(scenario), _asked_classes(scenario)
    if scenario.partition_spec.kind == "folders":
        records = _read_folders(data, classes, scenario.task_name)
    else:
        records = [("", read_records(data, classes=classes, task=scenario.task_name))]
    preprocessing = Preprocessing(
        image_size=scenario.image_size or _native_size(records[0][1]) or DEFAULT_IMAGE_SIZE,
        channels=scenario.channels or channels_of(records[0][1]),
    )
    cache = cache_folder()
    parts = [
        decode_records(
            part,
            preprocessing=preprocessing,
            cache_folder=cache,
            max_pixels=data.max_pixels,
            max_skipped_share=data.max_skipped_share,
        )
        for _, part in records
    ]
    decoded = parts[0] if len(parts) == 1 else _join([name for name, _ in records], parts)
    return ReadImages(
        name=data_name(scenario.data),
        decoded=decoded,
        preprocessing=preprocessing,
        notes=_notes(decoded, cache if isinstance(records[0][1].source, ImageFiles) else None),
    )


def data_config(scenario: Scenario) -> DataConfig:
    """Where the scenario's images are."""
    most = scenario.max_skipped_share
    return DataConfig(
        path=scenario.data,
        path_column=scenario.path_column,
        path_root=scenario.path_root,
        label_column=scenario.label_column,
        patient_column=scenario.patient_column,
        split_column=scenario.split_column,
        frame_column=scenario.frame_column,
        volume_column=scenario.volume_column,
        **({} if most is None else {"max_skipped_share": most}),
    )


def data_name(path: str) -> str:
    """Short name of data at `path`: its file or folder, the folder where the file is called `metadata`."""
    resolved = Path(path).resolve()
    stem = resolved.stem if resolved.is_file() else resolved.name
    return slug(resolved.parent.name if stem.casefold() in _SAY_LITTLE else stem)


def cache_folder() -> Path:
    """Where decoded images are kept between runs: `$XDG_CACHE_HOME/hospital-federation`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hospital-federation"


def channels_of(records: Records) -> int:
    """1 when most of some images spread over the data are grey, whatever their mode; else 3."""
    rows = np.unique(np.linspace(0, len(records) - 1, _LOOKED_AT).astype(np.int64))
    coloured = [seen for row in rows.tolist() if (seen := _is_coloured(records.source, row)) is not None]
    return 3 if coloured and sum(coloured) > len(coloured) / 2 else 1


def _is_coloured(source: ImageArray | ImageFiles, row: int) -> bool | None:
    """Whether one image shows colour at a glance; None when it cannot be read."""
    glance = Preprocessing(image_size=32, channels=3)
    pixels: NDArray[np.uint8]
    if isinstance(source, ImageArray):
        if source.pixels.ndim == 3:
            return False
        pixels = glance.fit_array(source.pixels[row : row + 1])[0]
    else:
        limit = DataConfig(path="").max_pixels
        try:
            with guarded_pillow(limit):
                picture = read_entry(source.paths[row], source.view(row), max_pixels=limit)
            pixels = glance.fit(picture)
        except Unusable:
            return None
    spread = pixels.max(axis=0).astype(np.int64) - pixels.min(axis=0)
    # A coloured marker in a corner of a grey film is still a grey film.
    return bool(np.mean(spread > _GREY_TOLERANCE) > 0.05)


def _native_size(records: Records) -> int | None:
    """Side of the images of an array; None for files, whose sizes differ."""
    if not isinstance(records.source, ImageArray):
        return None
    return int(max(records.source.pixels.shape[1:3]))


def _asked_classes(scenario: Scenario) -> Sequence[str] | None:
    """Classes of `--set data.classes=[...]`; None leaves them to the data."""
    classes = scenario.overrides.get("data", {}).get("classes")
    if classes is None:
        return None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ConfigError(
            f"--set data.classes={classes!r} is not a list of names",
            fix="""write --set 'data.classes=["normal", "pneumonia"]'""",
        )
    return classes


def _read_folders(data: DataConfig, classes: Sequence[str] | None, task: str) -> list[tuple[str, Records]]:
    """(name, records) of each sub-folder of the data root, with the classes of all of them."""
    root = Path(data.path)
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if len(folders) < 2:
        raise ConfigError(
            f"--partition folders finds {len(folders)} sub-folders in {root}",
            why="each sub-folder of the data root is one hospital, in any of the layouts",
            fix="name such a folder as --data, or use --partition iid",
        )
    # Reading with one made-up class list would skip everything, so each folder is read as it is first.
    read = [_read_folder(data.model_copy(update={"path": str(folder)})) for folder in folders]
    names = classes or _united(read, task)
    return [
        (folder.name, with_classes(records, names, task=task))
        for folder, records in zip(folders, read, strict=True)
    ]


def _read_folder(data: DataConfig) -> Records:
    from client.images.layout import find_records

    return find_records(data)


def _united(parts: Sequence[Records], task: str) -> tuple[str, ...]:
    stated = {part.classes for part in parts if part.classes}
    if len(stated) == 1:
        return stated.pop()
    labels = [label for part in parts for label in part.labels]
    if task == MULTI_LABEL:
        labels = [name for label in labels for name in findings_in(label)]
    return classes_of(labels)


def _join(names: Sequence[str], parts: Sequence[DecodedRecords]) -> DecodedRecords:
    """One table of several hospitals' tables; patient 7 of one hospital is not patient 7 of another."""
    tables = [
        replace(
            part.examples, unit_ids=tuple(_joined_id(part, name, unit) for unit in part.examples.unit_ids)
        )
        for name, part in zip(names, parts, strict=True)
    ]
    joined = concatenate(tables)
    split_of = {
        unit: split
        for table, part in zip(tables, parts, strict=True)
        for unit, split in zip(table.unit_ids, part.unit_splits, strict=True)
    }
    return replace(
        parts[0],
        examples=joined,
        unit="patient" if all(part.unit == "patient" for part in parts) else "image",
        unit_splits=tuple(split_of[unit] for unit in joined.unit_ids),
        groups={
            FOLDERS_COLUMN: tuple(
                name for name, part in zip(names, parts, strict=True) for _ in range(part.examples.num_rows)
            )
        },
        skipped=tuple(entry for part in parts for entry in part.skipped),
        units_in_several_splits=sum(part.units_in_several_splits for part in parts),
        repeated_images=sum(part.repeated_images for part in parts),
    )


def _joined_id(part: DecodedRecords, folder: str, unit_id: str) -> str:
    """Without patient ids a unit is its picture, and the same picture is the same unit everywhere."""
    return f"{folder}/{unit_id}" if part.unit == "patient" else unit_id


def _generate(scenario: Scenario) -> ReadImages:
    """Chest phantoms of several hospitals, each with its own scanner."""
    spec = scenario.partition_spec
    if scenario.task_name != CLASSIFICATION:
        raise ConfigError(
            f"generated images have no labels for a task {scenario.task_name}",
            why="each phantom has one finding or none",
            fix="name --data, or leave --task out",
        )
    if spec.finds_hospitals and spec.column != "site":
        raise ConfigError(
            f"generated images have no column {spec.column!r}",
            fix="use --partition column:site, or name --data",
        )
    preprocessing = Preprocessing(
        image_size=scenario.image_size or PHANTOM_SIZE, channels=scenario.channels or 1
    )
    sites = [
        hospital_phantoms(
            hospital=number,
            num_patients=PHANTOM_PATIENTS,
            image_size=max(16, preprocessing.image_size),
            seed=scenario.seed,
        )
        for number in range(1, (scenario.hospitals or DEFAULT_HOSPITALS) + 1)
    ]
    tables = []
    for site in sites:
        number_of = {patient: number for number, patient in enumerate(dict.fromkeys(site.patients))}
        tables.append(
            Examples(
                inputs={"image": preprocessing.fit_array(site.images)},
                targets=site.labels,
                units=np.array([number_of[patient] for patient in site.patients], np.int64),
                unit_ids=tuple(number_of),
            )
        )
    examples = concatenate(tables)
    decoded = DecodedRecords(
        examples=examples,
        classes=CLASSES,
        unit="patient",
        unit_splits=("",) * examples.num_units,
        groups={"site": tuple(slug(site.site) for site in sites for _ in site.patients)},
        skipped=(),
        units_in_several_splits=0,
        repeated_images=0,
        layout="generated chest phantoms",
    )
    return ReadImages(
        name="phantoms",
        decoded=decoded,
        preprocessing=preprocessing,
        notes=("the images are generated by a program: they show nobody and say nothing about medicine",),
    )


def _notes(decoded: DecodedRecords, cache: Path | None) -> tuple[str, ...]:
    notes = [decoded.layout] if decoded.layout else []
    if decoded.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(decoded.skipped).items())
        notes.append(f"{len(decoded.skipped)} images are left out: {reasons}")
    if torn := decoded.units_in_several_splits:
        notes.append(f"{torn} patients stood in several splits; each is in the strictest one now")
    if decoded.repeated_images:
        notes.append(f"{decoded.repeated_images} images occur more than once")
    if decoded.unit == "image":
        notes.append("no patient ids are known: what is protected is one image, not one patient")
    if cache is not None:
        notes.append(f"decoded images are kept in {cache}")
    return tuple(notes)
