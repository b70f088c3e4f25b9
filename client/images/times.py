"""When an image was taken, from what a table says: a date, a number of days, or an order number."""

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

from client.images.tables import plain_name

DAYS_PER_YEAR: Final = 365.25
_MOST_DAYS: Final = 1e6
_ORDERS: Final = ("visit", "visitnumber", "order")
_FORMATS: Final = ("%Y/%m/%d", "%d.%m.%Y", "%B %d, %Y", "%b %d, %Y", "%d %B %Y", "%d %b %Y", "%Y-%m", "%Y")


class Moment(NamedTuple):
    """A place in time; only differences within a patient mean anything."""

    place: float
    """Days, or the order number."""
    is_order: bool = False
    """Whether it says what came first and not how long ago."""

    def years_since(self, before: "Moment") -> float:
        """Years from `before` to this; 0 where only the order is known."""
        return 0.0 if self.is_order else max(0.0, self.place - before.place) / DAYS_PER_YEAR


def moments(column: str, texts: Sequence[str]) -> list[Moment | None]:
    """What each text of a column says; None for blanks and what is neither a date nor a number.

    A column of more numbers than dates holds days (called `visit`, `visitnumber` or `order`: order numbers),
    unless its name says date; 20240131 is a date. 03/04/24 is none: it has two readings.
    """
    name = plain_name(column)
    numbers, days = [_number(text) for text in texts], [_days(text) for text in texts]
    if "date" not in name and numbers.count(None) <= days.count(None):
        is_order = name in _ORDERS
        return [None if number is None else Moment(number, is_order) for number in numbers]
    return [None if day is None else Moment(day) for day in days]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and abs(number) <= _MOST_DAYS else None


def _days(text: str) -> float | None:
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
        for form in _FORMATS:
            try:
                found = datetime.strptime(text, form)
            except ValueError:
                continue
            break
    if found is None:
        return None
    since = found.replace(tzinfo=None) - datetime(1900, 1, 1)
    return since.total_seconds() / 86_400
