"""What differs from file to file (depth, colours, spacing, orientation), and whether it tells the class."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from client.doctor.facts import Facts
from client.doctor.findings import Finding, alone, counted, fine
from client.doctor.material import Material
from common.checks import CheckState

_SIDEWAYS: Final = 1.1
"""Longer side by shorter from which a picture lies or stands."""
_FEW: Final = 0.1
_ENOUGH: Final = 20
_TELLS: Final = 0.8
_LEAST_OF_CLASS: Final = 5
_SPREAD_NOTED, _SPREAD_WARNED = 1.05, 2.0
_SQUARE: Final = 0.01


def mixture_findings(material: Material) -> list[Finding]:
    """Nothing for images in one array: they have one size, depth and no header."""
    if not material.facts:
        return []
    return [
        _mixture(material, "bit depth", lambda f: f"{f.bits} bits" if f.bits else "", _DEPTH),
        _mixture(material, "colours", lambda f: f.colours, _COLOURS),
        _mixture(material, "modality", lambda f: f.modality, _MODALITY),
        _view(material),
        _directions(material),
        _turned(material),
        _sideways(material),
        _spacing(material),
    ]


_DEPTH = "8-bit exports lost what deeper files have: export all from the same place if you can"
_COLOURS = "read as grey or colour alike, MONOCHROME1 turned round; check that they are one kind of picture"
_MODALITY = "check that all belong to the study"


def follows_class(values: Sequence[str], labels: Sequence[str]) -> float:
    """Cramer's V of two columns: 0 independent, 1 the value tells the class; 0 for too few rows to say.

    >>> follows_class(["a"] * 10 + ["b"] * 10, ["ill"] * 10 + ["well"] * 10)
    1.0
    """
    kinds, classes = sorted(set(values)), sorted(set(labels))
    if len(values) < _ENOUGH or len(kinds) < 2 or len(classes) < 2:
        return 0.0
    table = np.zeros((len(kinds), len(classes)))
    np.add.at(table, ([kinds.index(v) for v in values], [classes.index(label) for label in labels]), 1)
    if (table.sum(axis=0) < _LEAST_OF_CLASS).any():
        return 0.0
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    chi_squared = ((table - expected) ** 2 / expected).sum()
    return float(np.sqrt(chi_squared / (table.sum() * (min(table.shape) - 1))))


def _mixture(material: Material, name: str, of: Callable[[Facts], str], advice: str) -> Finding:
    """Which values there are; a warning where they go with the class."""
    values = [of(facts) for facts in material.facts]
    stated = [row for row, value in enumerate(values) if value]
    kinds = Counter(values[row] for row in stated)
    if len(kinds) < 2:
        return fine(name, next(iter(kinds), "not stated"))
    usual = kinds.most_common(1)[0][0]
    strength = follows_class([values[row] for row in stated], [material.labels[row] for row in stated])
    tells = strength >= _TELLS
    return Finding(
        name=name,
        severity=CheckState.WARNING if tells else CheckState.NOTE,
        result=counted(values[row] for row in stated) + (": nearly tells the class" if tells else ""),
        advice="a model may learn this instead of the disease: take both classes from the same source"
        if tells
        else advice,
        files=alone([material.names[row] for row in stated if values[row] != usual]),
    )


def _view(material: Material) -> Finding:
    finding = _mixture(material, "view", lambda facts: facts.view, "")
    lateral = [row for row, facts in enumerate(material.facts) if facts.is_lateral]
    frontal = sum(facts.view in ("AP", "PA") for facts in material.facts)
    if finding.severity is CheckState.WARNING or not (lateral and frontal):
        return finding
    return Finding(
        name="view",
        severity=CheckState.WARNING,
        result=finding.result,
        advice="films from the side among frontal ones: check that the study wants both",
        files=alone(material.named(lateral)),
    )


def _directions(material: Material) -> Finding:
    """PatientOrientation, among files with the same view."""
    name = "patient orientation"
    stated = [row for row, facts in enumerate(material.facts) if facts.directions]
    odd: list[int] = []
    for view in {material.facts[row].view for row in stated}:
        rows = [row for row in stated if material.facts[row].view == view]
        usual = Counter(material.facts[row].directions for row in rows).most_common(1)[0][0]
        odd += [row for row in rows if material.facts[row].directions != usual]
    if not odd:
        return fine(name, counted(material.facts[row].directions for row in stated) or "not stated")
    return Finding(
        name=name,
        severity=CheckState.WARNING,
        result=counted(material.facts[row].directions for row in stated),
        advice="mirrored or turned against the others, which no reader undoes: look at them",
        files=alone(material.named(sorted(odd))),
    )


def _turned(material: Material) -> Finding:
    rows = [row for row, facts in enumerate(material.facts) if facts.exif_orientation != 1]
    if not rows:
        return fine("EXIF orientation", "none is set")
    return Finding(
        name="EXIF orientation",
        severity=CheckState.NOTE,
        result=f"set in {len(rows)}: they are turned as it says",
        advice="programs that ignore it show them sideways: look at a few",
        files=alone(material.named(rows)),
    )


def _sideways(material: Material) -> Finding:
    name = "landscape and portrait"
    shapes = [_shape(facts) for facts in material.facts]
    counts = Counter(shape for shape in shapes if shape)
    words = counted(shape for shape in shapes if shape)
    lying, standing = counts["landscape"], counts["portrait"]
    rarer = "landscape" if lying < standing else "portrait"
    few, many = min(lying, standing), max(lying, standing)
    if not few:
        return fine(name, words or "unknown")
    is_odd = few <= _FEW * many and many >= _ENOUGH
    return Finding(
        name=name,
        severity=CheckState.WARNING if is_odd else CheckState.NOTE,
        result=words,
        advice=f"few are {rarer}: they may lie sideways, look at them"
        if is_odd
        else "all are made square by resizing: check that none lies sideways",
        files=alone(material.named([row for row, shape in enumerate(shapes) if shape == rarer])),
    )


def _shape(facts: Facts) -> str:
    width, height = facts.width, facts.height
    if not width or not height:
        return ""
    if facts.exif_orientation >= 5:
        width, height = height, width
    if max(width, height) <= _SIDEWAYS * min(width, height):
        return "square"
    return "landscape" if width > height else "portrait"


def _spacing(material: Material) -> Finding:
    name = "pixel spacing"
    stated = [(row, spacing) for row, facts in enumerate(material.facts) if (spacing := facts.spacing)]
    if not stated:
        return fine(name, "not stated")
    means = np.sqrt([rows * columns for _, (rows, columns) in stated])
    oblong = [row for row, (rows, columns) in stated if abs(rows / columns - 1) > _SQUARE]
    silent = len(material) - len(stated)
    low, high = float(means.min()), float(means.max())
    words = f"{low:.3g} mm" if high <= low * _SPREAD_NOTED else f"{low:.3g} to {high:.3g} mm"
    words += f"; {silent} do not say" if silent else ""
    if oblong:
        words += f"; pixels of {len(oblong)} are not square, which is not corrected"
    if high <= low * _SPREAD_NOTED and not oblong:
        return fine(name, words)
    middle = float(np.median(means))
    apart = [
        row for (row, _), mean in zip(stated, means, strict=True) if max(mean / middle, middle / mean) > 1.5
    ]
    warned = high > low * _SPREAD_WARNED or oblong
    return Finding(
        name=name,
        severity=CheckState.WARNING if warned else CheckState.NOTE,
        result=words,
        advice="the same organ has another size: check that detectors, zoom or crops are meant to differ",
        files=alone(material.named(sorted({*oblong, *apart}))),
    )
