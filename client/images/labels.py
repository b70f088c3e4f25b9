"""Labels: from the words in a hospital's data to the federation's classes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from client.images.findings import findings_in, fitted_findings, plain
from client.images.records import Records, SkippedImage, SkipReason
from common.errors import DataError
from common.task_kinds import CLASSIFICATION, MULTI_LABEL, ORDINAL

_ABSENCES = {"negative", "normal", "no finding", "none", "healthy", "control", "benign", "absent", "no"}
_MOST_CLASSES = 1000


def classes_of(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names of data that nobody described: sorted, numbers by value, absence of a finding first.

    Absence comes first because for two classes the last one is the finding. Raises DataError for fewer than
    two classes or more than 1000.
    """
    found = {label for label in labels if label}
    if found and all(label.isdecimal() for label in found):
        # Labels 0 and 2 of a small sample still mean at least three classes.
        names = tuple(str(number) for number in range(max(int(label) for label in found) + 1))
    else:
        names = tuple(sorted(found, key=lambda label: (plain(label) not in _ABSENCES, label)))
    if len(names) > _MOST_CLASSES:
        raise DataError(
            f"{len(names)} different labels",
            why="this looks like a column of numbers or texts, not of classes",
            fix="name the label column: --label-column",
        )
    if len(names) < 2:
        raise DataError(
            f"the images have {len(names)} class ({', '.join(names)})",
            why="a classifier needs at least two",
            fix="check the label column or folders, or name the classes: data.classes",
        )
    return names


def with_classes(records: Records, classes: Sequence[str] | None, *, task: str = CLASSIFICATION) -> Records:
    """Write each label as one of `classes` (found in the data when None); skip and list what is none of them.

    A label fits by its exact name, by its name without regard to case and punctuation, or, where no class
    is named by a number, by its index. Data that name their own classes are understood by those names.
    Of a multi-label task a label is any number of classes, of an ordinal one a number may lie between two
    levels named by numbers and goes to the nearest. Raises DataError where nothing fits, or where levels
    that are no numbers have no order.
    """
    own = records.classes
    if task == MULTI_LABEL:
        return _with_findings(records, classes)
    if records.task == MULTI_LABEL:
        raise DataError(
            f"several labels for one image are no {task}",
            why="the labels stand in several columns of yes and no",
            fix="write data.task = 'multi-label' (--task multi-label), or name one label column",
        )
    written = [own[int(n)] if n.isdecimal() and int(n) < len(own) else n for n in records.labels]
    if task == ORDINAL:
        named = set(classes or own)
        written = [label if label in named else _nearest_level(label) for label in written]
        _require_an_order(written, classes or own)
    names = tuple(classes) if classes is not None else own or classes_of(written)
    exact = {name: name for name in names}
    by_plain = {plain(name): name for name in names}
    if not own and not any(name.isdecimal() for name in names):
        by_plain |= {str(index): name for index, name in enumerate(names)}
    fitted = [exact.get(label) or by_plain.get(plain(label)) for label in written]
    kept = [row for row, name in enumerate(fitted) if name is not None]
    if not kept and any(written):
        raise DataError(
            "no image has one of the federation's classes",
            why=f"the classes are {', '.join(names)}; the images say {', '.join(sorted(set(written))[:6])}",
            fix="set data.classes of the federation to those, or rename the folders or labels",
        )
    skipped = [
        SkippedImage(records.source.name(row), SkipReason.UNKNOWN_LABEL if label else SkipReason.BLANK_LABEL)
        for row, label in enumerate(written)
        if fitted[row] is None
    ]
    fitted_labels = tuple(name for name in fitted if name is not None)
    return replace(records.take(kept, skipped=skipped), labels=fitted_labels, classes=names, task=task)


def _with_findings(records: Records, classes: Sequence[str] | None) -> Records:
    """The same for labels that name several findings at once; none of them is a label, too."""
    own = records.classes
    names = tuple(classes) if classes is not None else own
    if not names:
        names = classes_of(name for label in records.labels for name in findings_in(label))
    fitted = [fitted_findings(label, names, own=own) for label in records.labels]
    kept = [row for row, label in enumerate(fitted) if label is not None]
    if not kept and any(records.labels):
        raise DataError(
            "no image has labels that are all among the federation's findings",
            why=f"the findings are {', '.join(names)}; the images say "
            f"{', '.join(sorted(set(records.labels))[:6])}",
            fix="set data.classes of the federation to those, or write several with | between them",
        )
    skipped = [
        SkippedImage(records.source.name(row), SkipReason.UNKNOWN_LABEL if label else SkipReason.BLANK_LABEL)
        for row, label in enumerate(records.labels)
        if fitted[row] is None
    ]
    labels = tuple(label for label in fitted if label is not None)
    taken = records.take(kept, skipped=skipped)
    return replace(taken, labels=labels, classes=names, task=MULTI_LABEL)


def _require_an_order(written: Sequence[str], classes: Sequence[str] | None) -> None:
    texts = sorted({label for label in written if label and not label.isdecimal()})
    if not classes and texts:
        raise DataError(
            f"the levels have no order: {', '.join(texts[:4])}",
            why="an ordinal task needs to know which level is worse, and the alphabet does not",
            fix="name them from the lowest to the highest: data.classes",
        )


def _nearest_level(label: str) -> str:
    """A number with a decimal point as the nearest whole one, halves upwards; anything else as it is."""
    try:
        value = float(label) if "." in label else -1.0
    except ValueError:
        value = -1.0
    return str(int(value + 0.5)) if 0 <= value < _MOST_CLASSES else label
