"""Labels: from the words in a hospital's data to the federation's classes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from client.images.records import Records, SkippedImage, SkipReason
from common.errors import DataError

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
        names = tuple(sorted(found, key=lambda label: (plain_label(label) not in _ABSENCES, label)))
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


def with_classes(records: Records, classes: Sequence[str] | None) -> Records:
    """Write each label as one of `classes` (found in the data when None); skip and list what is none of them.

    A label fits by its exact name, by its name without regard to case and punctuation, or, where no class
    is named by a number, by its index. Data that name their own classes are understood by those names.
    """
    own = records.classes
    written = [own[int(n)] if n.isdecimal() and int(n) < len(own) else n for n in records.labels]
    names = tuple(classes) if classes is not None else own or classes_of(written)
    exact = {name: name for name in names}
    plain = {plain_label(name): name for name in names}
    if not own and not any(name.isdecimal() for name in names):
        plain |= {str(index): name for index, name in enumerate(names)}
    fitted = [exact.get(label) or plain.get(plain_label(label)) for label in written]
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
    return replace(records.take(kept, skipped=skipped), labels=fitted_labels, classes=names)


def plain_label(label: str) -> str:
    """A label without regard to case, spaces and punctuation."""
    return " ".join("".join(c if c.isalnum() else " " for c in label.casefold()).split())
