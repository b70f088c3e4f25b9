"""HTML that cannot be injected into: plain text is escaped, only `Html` passes as it is."""

import html
import math
import time
from collections.abc import Iterable, Sequence

VOID = frozenset({"img", "meta", "br", "hr"})
"""Elements without content and closing tag."""


class Html(str):
    """Text that is markup already; everything else is escaped when it is put in."""

    __slots__ = ()


Content = str | Iterable[str]


def tag(name: str, /, *content: Content, **attributes: str | int | bool) -> Html:
    """One element; `class_` and `for_` lose the underscore, True writes a bare attribute, False none.

    Example: tag("b", "<x>") is `<b>&lt;x&gt;</b>`.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items() if value is not False)
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{''.join(_flat(content))}</{name}>")


def join(*content: Content) -> Html:
    """Several pieces one after the other."""
    return Html("".join(_flat(content)))


def section(title: str, identifier: str, *content: Content) -> Html:
    """A part of the page under its own heading."""
    heading = tag("h2", title, id=f"{identifier}-title")
    return tag("section", heading, *content, id=identifier, aria_labelledby=f"{identifier}-title")


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table whose first column heads its rows; it scrolls sideways on a narrow screen.

    Two columns are read as text, more as numbers.
    """
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header)))
    body = tag(
        "tbody",
        *(tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows),
    )
    kind = {"class_": "facts"} if len(header) == 2 else {}
    return tag("div", tag("table", tag("caption", caption), head, body, **kind), class_="scroll")


def figure(number: float | None, digits: int = 3) -> str:
    """A score as people write it: `.871`, `1.000`; a dash where there is none."""
    if number is None or not math.isfinite(number):
        return "–"
    text = f"{number:.{digits}f}"
    return text.removeprefix("0") if text.startswith("0.") else text.replace("-0.", "-.", 1)


def quantity(number: float | None, digits: int = 2) -> str:
    """A plain number with thousands separated; a dash where there is none."""
    if number is None or not math.isfinite(number):
        return "–"
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.{digits}f}"


def bound(number: float | None, digits: int = 2) -> str:
    """A proven upper bound, rounded up, never down; a dash where there is none.

    Example: an epsilon of 2.6412 is printed as 2.65, since 2.64 would claim too much.
    """
    if number is None or not math.isfinite(number):
        return "–" if number is None or math.isnan(number) else "infinite"
    scaled = number * 10**digits
    nearest = round(scaled)
    # Binary fractions: 2.65 * 100 is a hair above 265 and must stay 2.65.
    whole = nearest if math.isclose(scaled, nearest, rel_tol=1e-12) else math.ceil(scaled)
    return f"{whole / 10**digits:.{digits}f}"


def spent(epsilon: float | None, digits: int = 2, *, complete: bool) -> str:
    """An epsilon as `bound` prints it; `2.65 or more` where not all that was charged is known."""
    if complete:
        return bound(epsilon, digits)
    return "unknown" if epsilon is None else f"{bound(epsilon, digits)} or more"


def tiny_bound(number: float | None) -> str:
    """A tiny upper bound such as delta, rounded up: 3.3333e-4 is `3.34e-4`; a dash where there is none."""
    if number is None or not 0 < number < 1:
        return "–"
    exponent = math.floor(math.log10(number))
    digits = bound(number / 10.0**exponent, 2)
    return f"{digits}e{exponent}" if digits != "10.00" else f"1.00e{exponent + 1}"


def interval(bounds: object, digits: int = 3) -> str:
    """A confidence interval: `.850 to .890`; empty where there is none."""
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        return ""
    return f"{figure(bounds[0], digits)} to {figure(bounds[1], digits)}"


def size(num_bytes: float) -> str:
    """Bytes in a unit a person reads."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def duration(seconds: float | None) -> str:
    """Seconds in a unit a person reads: `0.42 s`, `24 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "–"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def date(unix_seconds: float | None) -> str:
    """A moment in UTC; a dash where there is none."""
    if unix_seconds is None:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_seconds))


def _attribute(key: str, value: str | int | bool) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'


def _flat(content: Iterable[Content]) -> Iterable[str]:
    for piece in content:
        if isinstance(piece, Html):
            yield piece
        elif isinstance(piece, str):
            yield html.escape(piece)
        else:
            yield from _flat(piece)
