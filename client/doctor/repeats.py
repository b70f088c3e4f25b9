"""The same picture twice: byte for byte, or to the eye; and where that is a leak."""

from collections.abc import Sequence

import numpy as np

from client.doctor.findings import Finding, fine, number_of
from client.doctor.material import Material
from client.doctor.near_duplicates import near_duplicates
from common.checks import CheckState

_LEAK_OF_SPLITS = "a leak: what is trained on is tested on; remove one, or put both into one split"
_LEAK_OF_PATIENTS = (
    "a leak: one person under two ids is protected half as well; give both one id, or remove the wrong one"
)


def repeat_findings(material: Material) -> list[Finding]:
    """Exact and near repetitions: how many, across patients, across splits."""
    by_picture: dict[str, list[int]] = {}
    for row, picture in enumerate(material.pictures):
        by_picture.setdefault(picture, []).append(row)
    exact = [rows for rows in by_picture.values() if len(rows) > 1]
    firsts = np.array([rows[0] for rows in by_picture.values()], np.int64)
    near = [
        [same for row in group for same in by_picture[material.pictures[row]]]
        for group in near_duplicates(material.pixels, firsts)
    ]
    return [*_exact(material, exact), *_near(material, near)]


def _exact(material: Material, groups: Sequence[list[int]]) -> list[Finding]:
    name = "repeated pictures"
    if not groups:
        return [fine(name)]
    by_patient = material.unit == "patient"
    advice = "listed twice, a picture weighs twice: keep one" if by_patient else ""
    repeats = sum(len(group) - 1 for group in groups)
    every = Finding(
        name=name,
        severity=CheckState.NOTE,
        result=str(repeats),
        advice=advice,
        files=tuple(material.named(group) for group in groups),
    )
    return [every, *_leaks(material, groups, "repeated")]


def _near(material: Material, groups: Sequence[list[int]]) -> list[Finding]:
    name = "near-duplicates"
    if not groups:
        return [fine(name)]
    by_patient = material.unit == "patient"
    every = Finding(
        name=name,
        severity=CheckState.NOTE if by_patient else CheckState.WARNING,
        result=f"{number_of(len(groups), 'group')} of {sum(map(len, groups))} pictures that differ in size, "
        "coding or shade only",
        advice="nothing must be done about those of one patient, such as neighbouring slices"
        if by_patient
        else "without patient ids each counts as its own unit: name a patient column, or keep one of each",
        files=tuple(material.named(group) for group in groups),
    )
    return [every, *_leaks(material, groups, "near-duplicates")]


def _leaks(material: Material, groups: Sequence[list[int]], what: str) -> list[Finding]:
    found: list[Finding] = []
    patients = [group for group in groups if len(set(material.units[group].tolist())) > 1]
    splits = [group for group in groups if len({material.splits[row] for row in group}) > 1]
    for where, torn, advice in (
        ("patients", patients if material.unit == "patient" else [], _LEAK_OF_PATIENTS),
        ("splits", splits, _LEAK_OF_SPLITS),
    ):
        if torn:
            pictures = sum(map(len, torn))
            found.append(
                Finding(
                    name=f"{what} across {where}",
                    severity=CheckState.WARNING,
                    result=f"{number_of(len(torn), 'group')} of {pictures} pictures in several {where}",
                    advice=advice,
                    files=tuple(material.named(group) for group in torn),
                )
            )
    return found
