"""Labels that name several findings at once: `Edema|Effusion`, `0|2`, or one column of 0 and 1 for each."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.images.records import SkipReason, Unusable

SEPARATOR: Final = "|"
LADDER: Final = ">"
"""Between columns of yes and no that are the steps of one ladder."""
NONE_OF_THEM: Final = SEPARATOR
"""How a reader writes a label that it knows to name none of the findings: a blank one is unknown."""
_SEPARATORS: Final = ("|", ";", ",")
_NOTHING: Final = {"no finding", "no findings", "none", "normal", "negative", "healthy", "nothing"}
_YES: Final = {"1", "1.0", "y", "yes", "true", "t", "positive", "present"}
_NO: Final = {"0", "0.0", "n", "no", "false", "f", "negative", "absent"}


def findings_in(label: str) -> tuple[str, ...]:
    """The findings that a label names, as written; none for a word such as `No Finding` or `normal`.

    Between them stand `|` or `;`, or commas where neither is there.
    """
    separator = next((sign for sign in _SEPARATORS if sign in label), SEPARATOR)
    names = [name.strip() for name in label.split(separator)]
    return tuple(name for name in names if name and plain(name) not in _NOTHING)


def fitted_findings(label: str, names: Sequence[str], *, own: Sequence[str] = ()) -> str | None:
    """The label in the federation's `names`, in their order; None for a blank or an unknown one.

    A finding fits as a class does (`client.images.labels.with_classes`). A class that is called like a word
    for nothing is a finding as any other. `own` are the data's own names of whole numbers.
    """
    if not label.strip():
        return None
    exact, by_plain = {name: name for name in names}, {plain(name): name for name in names}
    if not own and not any(name.isdecimal() for name in names):
        by_plain |= {str(index): name for index, name in enumerate(names)}

    def fitting(written: str) -> str | None:
        if written.isdecimal() and int(written) < len(own):
            written = own[int(written)]
        return exact.get(written) or by_plain.get(plain(written))

    whole = fitting(label.strip())
    if whole is not None:
        return whole
    found = [fitting(written) for written in findings_in(label)]
    if any(name is None for name in found):
        return None
    return SEPARATOR.join(name for name in names if name in found)


def joined_columns(row: Mapping[str, str], columns: Sequence[str]) -> str:
    """The label of a row with a column of yes and no for each finding; blank where one of them is blank.

    Raises Unusable for a value that says neither.
    """
    values = {column: row[column].casefold() for column in columns}
    if not all(values.values()):
        return ""
    if not set(values.values()) <= _YES | _NO:
        raise Unusable(SkipReason.UNKNOWN_LABEL)
    return SEPARATOR.join(column for column, value in values.items() if value in _YES) or NONE_OF_THEM


def ladder_level(row: Mapping[str, str], columns: Sequence[str]) -> str:
    """The level of a row with a column of yes and no for each step of a ladder: how many were reached.

    The first no ends it, whatever stands after it: who was not in intensive care was not ventilated there.
    Blank where a step before that is blank. Raises Unusable for a value that says neither yes nor no.
    """
    for level, column in enumerate(columns):
        value = row[column].casefold()
        if not value or value in _NO:
            return str(level) if value else ""
        if value not in _YES:
            raise Unusable(SkipReason.UNKNOWN_LABEL)
    return str(len(columns))


def joined_numbers(values: NDArray[np.generic]) -> tuple[str, ...]:
    """(rows,) labels of an array (rows, findings) of 0 and 1: the indices of the findings that are there."""
    return tuple(SEPARATOR.join(map(str, np.flatnonzero(row))) or NONE_OF_THEM for row in values)


def label_matrix(labels: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """(rows, findings) of 0 and 1, from labels that `fitted_findings` has written."""
    place = {name: index for index, name in enumerate(names)}
    matrix = np.zeros((len(labels), len(names)), np.int64)
    for row, label in enumerate(labels):
        for name in filter(None, label.split(SEPARATOR)):
            matrix[row, place[name]] = 1
    return matrix


def plain(label: str) -> str:
    """A label without regard to case and punctuation."""
    return " ".join("".join(c if c.isalnum() else " " for c in label.casefold()).split())
