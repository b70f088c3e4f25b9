"""Slices lost at the ends of a series, where no gap shows: from what the slices say of their number."""

from client.doctor.facts import SliceNumber
from client.doctor.findings import Finding, alone, fine
from client.doctor.material import Material
from common.checks import CheckState

_FEWEST = 3
"""With fewer slices listed one by one nobody meant a series."""


def series_findings(material: Material) -> list[Finding]:
    """One line; none where there is no series."""
    series: dict[str, dict[SliceNumber, None]] = {}
    first: dict[str, int] = {}
    listed: dict[str, int] = {}
    looked_at: set[tuple[SliceNumber, ...]] = set()
    for row, facts in enumerate(material.facts):
        if facts.slices in looked_at:  # another frame of the same file or folder
            continue
        looked_at.add(facts.slices)
        for number in filter(lambda number: number.series, facts.slices):
            series.setdefault(number.series, {})[number] = None
            first.setdefault(number.series, row)
            listed[number.series] = listed.get(number.series, 0) + 1
    several = {key: list(numbers) for key, numbers in series.items() if listed[key] >= _FEWEST}
    if not several:
        return []
    fewer, late, broken = [], [], []
    for key, numbers in several.items():
        promised = max((number.in_acquisition or 0 for number in numbers), default=0)
        instances = sorted({number.instance for number in numbers if number.instance is not None})
        if listed[key] < promised:
            fewer.append(key)
        elif instances and instances[0] > 1:
            late.append(key)
        elif instances and len(instances) < instances[-1] - instances[0] + 1:
            broken.append(key)
    if not fewer and not late and not broken:
        return [fine("ends of series", f"{len(several)} series, none says that slices are lost")]
    return [
        Finding(
            name="ends of series",
            severity=CheckState.NOTE,
            result=f"{len(fewer) + len(late) + len(broken)} of {len(several)} series may have lost slices: "
            f"{len(fewer)} have fewer than ImagesInAcquisition says, in {len(late)} the first instance "
            f"number is above 1, in {len(broken)} numbers are missing",
            advice="compare with the archive; scouts and localisers may bear the missing numbers",
            files=alone([material.names[first[key]] for key in (*fewer, *late, *broken)]),
        )
    ]
