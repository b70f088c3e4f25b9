"""Labels as the data write them against the classes of the federation."""

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Final

from client.doctor.findings import Finding, fine
from client.doctor.naming import printable
from client.images.findings import SEPARATOR, findings_in, plain
from client.images.labels import with_classes
from client.images.records import Records
from common.checks import CheckState
from common.errors import DataError
from common.task_kinds import MULTI_LABEL

_MOST: Final = 1000
_SHOWN: Final = 6


def label_findings(found: Records, *, classes: Sequence[str] | None, task: str) -> list[Finding]:
    """Labels that are no class (and which they may mean), classes without an image, other spellings."""
    own = found.classes
    written = [own[int(n)] if n.isdecimal() and int(n) < len(own) else n for n in found.labels]
    counts = Counter(label for label in written if label)
    if len(counts) > _MOST:
        return []
    if classes is None:
        return [_spelt_apart(counts)]
    first = {label: row for row, label in reversed(list(enumerate(written)))}
    read_as = {label: _read_as(found, first[label], classes, task) for label in counts}
    named = {name for read in read_as.values() if read is not None for name in _each(read, task)}
    unknown = [label for label, name in read_as.items() if name is None]
    respelt = {label: name for label, name in read_as.items() if name not in (None, label)}
    if task == MULTI_LABEL:  # joined by another sign, or in another order, is no other spelling
        respelt = {label: name for label, name in respelt.items() if name and not _same(label, name)}
    missing = [name for name in classes if name not in named]
    parts = [f"unknown: {_listed(counts, unknown)}"] if unknown else []
    parts += [f"read as classes: {_arrows(respelt)}"] if respelt else []
    parts += [f"no image of: {', '.join(missing)}"] if missing else []
    if not parts:
        return [fine("labels", "all are classes of the federation, and every class has images")]
    state = CheckState.WARNING if unknown else CheckState.NOTE
    return [Finding(name="labels", severity=state, result="; ".join(parts), advice=_advice(unknown, classes))]


def _read_as(found: Records, row: int, classes: Sequence[str], task: str) -> str | None:
    try:
        return with_classes(found.take([row]), classes, task=task).labels[0]
    except DataError:
        return None


def _each(label: str, task: str) -> list[str]:
    return label.split(SEPARATOR) if task == MULTI_LABEL else [label]


def _same(written: str, read: str) -> bool:
    return set(findings_in(written)) == set(_each(read, MULTI_LABEL)) - {""}


def _advice(unknown: Sequence[str], classes: Sequence[str]) -> str:
    if not unknown:
        return "correct if this hospital has none"
    by_plain = {plain(name): name for name in classes}
    close = {
        label: by_plain[near[0]]
        for label in unknown
        if (near := get_close_matches(plain(label), list(by_plain), n=1, cutoff=0.6))
    }
    meant = f"perhaps meant: {_arrows(close)}; " if close else ""
    return f"{meant}rename them, or take the images out of the data"


def _spelt_apart(counts: Counter[str]) -> Finding:
    """Without classes to compare with: labels that differ in case, spaces or punctuation only."""
    spellings: dict[str, list[str]] = {}
    for label in sorted(counts):
        spellings.setdefault(plain(label), []).append(label)
    twice = [labels for labels in spellings.values() if len(labels) > 1]
    if not twice:
        return fine("labels", f"{len(counts)} different; no federation to compare them with")
    words = "; ".join(" and ".join(printable(label) for label in labels) for labels in twice[:_SHOWN])
    return Finding(
        name="labels",
        severity=CheckState.WARNING,
        result=f"differ in case, spaces or punctuation only: {words}",
        advice="each spelling is a class of its own here: write them alike, or name the classes",
    )


def _listed(counts: Counter[str], labels: Sequence[str]) -> str:
    first = ", ".join(f"{printable(label)} {counts[label]}" for label in labels[:_SHOWN])
    return first + (f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else "")


def _arrows(pairs: dict[str, str | None] | dict[str, str]) -> str:
    first = [f"{printable(label)} -> {name}" for label, name in list(pairs.items())[:_SHOWN]]
    return ", ".join(first) + (f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else "")
