"""All usable images, looked at from every side: pixels as training decodes them, headers once more."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from client.doctor.facts import Facts, read_facts
from client.doctor.findings import Finding
from client.doctor.identities import identity_findings
from client.doctor.material import Material
from client.doctor.mixtures import mixture_findings
from client.doctor.naming import hidden, named_after_columns, names_a_person
from client.doctor.repeats import repeat_findings
from client.doctor.series_ends import series_findings
from client.doctor.shades import shade_findings
from client.images.batch import on_all_cores
from client.images.dataset import HospitalImages
from client.images.decode import guarded_pillow
from client.images.decoded import DecodedRecords
from client.images.records import ImageFiles, Records, SkipReason
from client.images.splits import SPLITS
from common.hospital_config import DataConfig

Watch = Callable[[str, int, int], None]
"""Hears (what is being done, how many are done, how many there are); by several threads."""


def unwatched(what: str, done: int, total: int) -> None:
    """Nobody listens."""


def examine(
    decoded: DecodedRecords, images: HospitalImages, found: Records, *, data: DataConfig, watch: Watch
) -> list[Finding]:
    """Findings about pictures, headers and names. `found` are the records as the data have them."""
    facts = _facts(decoded, max_pixels=data.max_pixels, watch=watch)
    material, concealed = _material(decoded, images, found, facts)
    watch("comparing pictures", 0, 1)
    findings = [*repeat_findings(material), *shade_findings(material)]
    watch("comparing pictures", 1, 1)
    return [
        *findings,
        *mixture_findings(material),
        *series_findings(material),
        *identity_findings(material, hidden=concealed, columns=found.groups, patients=found.unit_ids or ()),
    ]


def _facts(decoded: DecodedRecords, *, max_pixels: int, watch: Watch) -> tuple[Facts, ...]:
    """(rows,) each file's facts, read once however many rows it has; empty for an array."""
    source, rows = decoded.source, decoded.source_rows
    if not isinstance(source, ImageFiles) or rows is None:
        return ()
    paths = list(dict.fromkeys(source.paths[row] for row in rows))
    by_path: dict[str, Facts] = {}
    with guarded_pillow(max_pixels):
        outcomes = on_all_cores(
            lambda place: read_facts(paths[place], max_pixels=max_pixels), range(len(paths))
        )
        for path, facts in zip(paths, outcomes, strict=True):
            by_path[path] = Facts(format="unknown") if isinstance(facts, SkipReason) else facts
            watch("reading headers", len(by_path), len(paths))
    return tuple(by_path[source.paths[row]] for row in rows)


def _material(
    decoded: DecodedRecords, images: HospitalImages, found: Records, facts: tuple[Facts, ...]
) -> tuple[Material, list[str]]:
    """What is looked at, and the names, as shown, of the files that are named after somebody."""
    examples = decoded.examples
    split_of = {
        unit: split for split in SPLITS for unit in getattr(images, split).unit_ids
    }  # where training puts each
    source, rows = decoded.source, decoded.source_rows
    names: list[str] = []
    concealed: list[str] = []
    if source is not None and rows is not None:
        listed = [found.source.name(row) for row in range(len(found))]
        place = {name: row + 1 for row, name in enumerate(listed)}
        after_columns = named_after_columns(listed, found.groups)
        for row, name in enumerate(source.name(int(origin)) for origin in rows):
            is_named = names_a_person(name) or name in after_columns
            if is_named or (facts and facts[row].is_named):
                name = hidden(name, place.get(name))
                concealed.append(name)
            names.append(name)
    material = Material(
        pixels=examples.inputs["image"],
        pictures=decoded.pictures,
        names=tuple(names),
        units=np.asarray(examples.units),
        unit=decoded.unit,
        splits=tuple(split_of.get(examples.unit_ids[unit], "") for unit in examples.units),
        labels=tuple(_label(target, decoded.classes) for target in examples.targets),
        facts=facts,
    )
    return material, concealed


def _label(target: NDArray[np.int64], classes: Sequence[str]) -> str:
    """Name of a class index, or of all findings of a row of 0 and 1."""
    if np.ndim(target) == 0:
        return classes[int(target)]
    return " + ".join(name for name, present in zip(classes, target, strict=True) if present)
