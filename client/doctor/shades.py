"""Pictures without content, and negatives: the rules by which `flower-client predict` declines to answer."""

import numpy as np

from client.doctor.findings import Finding, alone, fine
from client.doctor.material import Material
from client.prediction.doubts import Rule, doubt_of_shades
from common.checks import CheckState

_FILMS = ("", "other", "CR", "DX", "RF", "OT", "SC")
"""Modalities that the rule for negatives can be about; it knows chest films only."""
_MOSTLY = 0.5


def shade_findings(material: Material) -> list[Finding]:
    """Blank, almost blank, inverted."""
    rows: dict[Rule, list[int]] = {rule: [] for rule in Rule}
    films = [row for row in range(len(material)) if _may_be_film(material, row)]
    is_film = np.zeros(len(material), np.bool_)
    is_film[films] = True
    for row, pixels in enumerate(material.pixels):
        grey = pixels[0] if len(pixels) == 1 else pixels.mean(axis=0).astype(np.uint8)
        doubt = doubt_of_shades(grey)
        if doubt is not None and (doubt.rule is not Rule.INVERTED or is_film[row]):
            rows[doubt.rule].append(row)
    return [
        _blank(material, rows[Rule.BLACK], rows[Rule.CONSTANT]),
        _flat(material, rows[Rule.LOW_CONTRAST]),
        _inverted(material, rows[Rule.INVERTED], len(films)),
    ]


def _may_be_film(material: Material, row: int) -> bool:
    if material.pixels.shape[1] != 1:
        return False
    if not material.facts:
        return True
    facts = material.facts[row]
    return facts.modality in _FILMS and facts.format != "NIfTI"


def _blank(material: Material, black: list[int], constant: list[int]) -> Finding:
    if not black and not constant:
        return fine("blank pictures")
    return Finding(
        name="blank pictures",
        severity=CheckState.WARNING,
        result=f"{len(black)} black, {len(constant)} of one shade",
        advice="nothing is to be seen in them: look at the originals, and remove them or export them again",
        files=alone(material.named(sorted(black + constant))),
    )


def _flat(material: Material, rows: list[int]) -> Finding:
    if not rows:
        return fine("low contrast")
    return Finding(
        name="low contrast",
        severity=CheckState.NOTE,
        result=f"{len(rows)} with fewer than 20 of 255 shades",
        advice="a wrong window, or an export that lost the depth: look at them",
        files=alone(material.named(rows)),
    )


def _inverted(material: Material, rows: list[int], films: int) -> Finding:
    name = "inverted"
    if not rows:
        return fine(name, "none" if films else "not looked for: the rule knows grey chest films only")
    if len(rows) > _MOSTLY * films:
        return Finding(
            name=name,
            severity=CheckState.NOTE,
            result=f"{len(rows)} of {films} look like negatives: presumably no chest films, which the "
            "rule is for",
            advice="if they are chest films, light and dark are exchanged: export them again",
            files=alone(material.named(rows)),
        )
    return Finding(
        name=name,
        severity=CheckState.WARNING,
        result=f"{len(rows)} of {films} look like negatives",
        advice="of chest films: look at them, and export real negatives again; of others: nothing",
        files=alone(material.named(rows)),
    )
