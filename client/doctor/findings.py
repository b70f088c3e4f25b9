"""A finding of the data doctor: a line of the table, and which files it is about."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.checks import Check, CheckState

Group = tuple[str, ...]
"""Files that belong together in a finding: one, or those that are the same picture."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line, for the hospital's own eyes. No value of a header or a table is ever in it."""

    name: str
    severity: CheckState
    result: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""
    files: tuple[Group, ...] = ()
    """What it is about, by name; the table leaves them out, JSON and `--list` do not."""

    @property
    def check(self) -> Check:
        """The same as a line of `flower-client check`."""
        return Check(name=self.name, state=self.severity, result=self.result, fix=self.advice)


def fine(name: str, result: str = "none") -> Finding:
    """A finding that nothing was found."""
    return Finding(name=name, severity=CheckState.OK, result=result)


def counted(values: Iterable[str], *, most: int = 8) -> str:
    """How often each value occurs, the most frequent first, `PA 30, AP 10`; of others how many more."""
    counts = Counter(values).most_common()
    shown = ", ".join(f"{value} {count}" for value, count in counts[:most])
    return shown + (f" and {len(counts) - most} more" if len(counts) > most else "")


def number_of(count: int, what: str) -> str:
    """`1 group`, `2 groups`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def alone(names: Sequence[str]) -> tuple[Group, ...]:
    """Files that a finding is about one by one."""
    return tuple((name,) for name in names)
