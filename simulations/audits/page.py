"""What the audits found, as one HTML file that loads nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.pages.document import Plot, document, images
from common.pages.html import Html, date, duration, join, quantity, section, table, tag
from common.pages.style import COLOURS
from server.reporting.canvas import canvas, short
from server.reporting.small_print import versions
from simulations.audits.finding import ALPHA, CLAIMED, CONFIDENCE, EMPIRICAL

Entry = Mapping[str, Any]
TITLE = "Privacy audits: attacks on our own training"


def page(content: Mapping[str, Any], folder: Path) -> str:
    """The report; pictures that the audits wrote are taken from `folder` into the page."""
    found: Sequence[Entry] = content["findings"]
    return document(
        TITLE,
        _head(content),
        _banner(found),
        _overview(found),
        *(_one(entry, number, folder) for number, entry in enumerate(found)),
        _reading(),
        section(
            "Where it comes from", "provenance", table("Versions.", ("what", "value"), versions().items())
        ),
    )


def _head(content: Mapping[str, Any]) -> Html:
    time, machine = content["time"], content["machine"]
    took = f"{date(time['started'])} · {duration(time['wall_s'])} on {machine['cores']} cores"
    quick = tag("p", "Quick: smaller samples than a full audit, so smaller defects may stay unseen.")
    return tag(
        "header", tag("h1", TITLE), tag("p", took, class_="soft"), quick if content["quick"] else Html("")
    )


def _banner(found: Sequence[Entry]) -> Html:
    failed = [str(entry["title"]) for entry in found if not entry["passed"]]
    headline = f"All {len(found)} audits passed"
    explanation = "None of these attacks found more than is claimed. That proves no absence of other defects."
    if failed:
        headline = f"{len(failed)} of {len(found)} audits failed"
        explanation = f"Do not train on patients before it is known why: {', '.join(failed)}."
    kind = "not-private plain" if failed else "private"
    return tag("div", tag("strong", headline), tag("p", explanation), class_=f"banner {kind}", role="note")


def _overview(found: Sequence[Entry]) -> Html:
    header = ("audit", "result", "sees", "claimed epsilon", "proven epsilon", "time")
    rows = [
        (
            str(entry["title"]),
            "passed" if entry["passed"] else "FAILED",
            "the update" if entry["black_box"] else "the inside",
            quantity(entry["numbers"].get(CLAIMED)),
            quantity(entry["numbers"].get(EMPIRICAL)),
            duration(entry["wall_s"]),
        )
        for entry in found
    ]
    caption = (
        "Proven epsilon is what the attack shows at least to leak, with the confidence named below: "
        "above the claim it would prove a defect, below it proves nothing."
    )
    return section("Overview", "overview", table(caption, header, rows), images([_bounds(found)]))


def _bounds(found: Sequence[Entry]) -> Plot | None:
    """Proven beside claimed epsilon of every audit that has both."""
    both = [e for e in found if None not in (e["numbers"].get(CLAIMED), e["numbers"].get(EMPIRICAL))]
    if not both:
        return None
    with canvas(width=7.0, height=1.4 + 0.4 * len(both)) as (axes, render):
        for place, entry in enumerate(both):
            claimed, proven = entry["numbers"][CLAIMED], entry["numbers"][EMPIRICAL]
            axes.barh([place], [proven], height=0.45, color=COLOURS[0] if entry["passed"] else COLOURS[5])
            axes.plot([claimed, claimed], [place - 0.35, place + 0.35], color="#1c2733", linewidth=2)
        axes.set_yticks(range(len(both)), [short(str(entry["title"])) for entry in both])
        axes.set(xlabel="epsilon: proven by the attack (bar), claimed (line)", ylim=(len(both) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        png = render()
    text = "; ".join(
        f"{entry['title']} {quantity(entry['numbers'][EMPIRICAL])} of {quantity(entry['numbers'][CLAIMED])}"
        for entry in both
    )
    return Plot(name="bounds", title="Proven and claimed epsilon", alt=f"Bars and lines: {text}.", png=png)


def _one(entry: Entry, number: int, folder: Path) -> Html:
    rows = [(name, _number(name, value)) for name, value in entry["numbers"].items()]
    verdict = tag("strong", "Passed. " if entry["passed"] else "Failed. ")
    pictures = [_picture(folder / name, entry) for name in entry["pictures"]]
    return section(
        str(entry["title"]),
        f"audit-{number}",
        tag("p", str(entry["tries"]), class_="soft"),
        tag("p", join(verdict, str(entry["said"]))),
        table("What was measured.", ("number", "value"), rows) if rows else "",
        images(pictures),
    )


def _picture(path: Path, entry: Entry) -> Plot | None:
    if not path.is_file():
        return None
    return Plot(name=path.stem, title=path.stem, alt=str(entry["said"]), png=path.read_bytes())


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == CONFIDENCE:
        return f"{100 * value:g} %"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e12 else f"{value:.4g}"


def _reading() -> Html:
    lines = (
        "Every audit runs the code of training, accounting and release as it is installed, on patients who "
        "do not exist.",
        f"Each is made so that sound code fails it about once in {1 / ALPHA:,.0f} audits.",
        "An audit that passes proves nothing by itself; that these audits do notice defects is shown by "
        "planting them (docs/audit.md).",
        "A proven epsilon is a lower bound for the worst patient that the attack could think of; the "
        "claimed one is an upper bound for every patient and every attack.",
    )
    return section("How to read this", "reading", tag("ul", *(tag("li", line) for line in lines)))
