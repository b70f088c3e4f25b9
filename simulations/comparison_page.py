"""Shows a comparison: table for the terminal, Markdown, one HTML file, one plot."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_bytes_atomically, write_json_atomically
from common.pages.document import Plot, document, images
from common.pages.html import Html, duration, figure, interval, quantity, section, table, tag
from common.pages.style import COLOURS
from common.task_kinds import CLASSIFICATION, MULTI_LABEL, ORDINAL
from server.reporting.canvas import canvas, short
from server.reporting.model_card import plain
from simulations.comparison import BASELINES_ARE, SCORES, Row, Trained, Verdict, rows_of, verdicts_of

if TYPE_CHECKING:
    from rich.table import Table

JSON, MARKDOWN, PAGE, PLOT = "comparison.json", "comparison.md", "comparison.html", "comparison.png"
_MEANS = {
    MULTI_LABEL: "Several findings at once: AUC and F1 are means over findings, the other scores undefined.",
    ORDINAL: "Ordered levels: AUC is the mean over the steps between them; recall and F1 are not defined.",
}
_BASELINES = (
    f"Classical baselines ({BASELINES_ARE}): grid means, histogram and oriented gradients of the picture, "
    "settings tuned on nothing, epsilon none. They say what simple means reach; no federation trains them."
)
HEADER = ("way", "AUC", "accuracy", "recall", "F1", "rounds", "time")
_COLOURS = {"central": COLOURS[2], "alone": COLOURS[7], "federated": COLOURS[0], "baseline": COLOURS[1]}


def write_comparison(folder: Path, content: Mapping[str, Any], trained: Sequence[Trained]) -> None:
    """Write comparison.json, .md, .html and .png into `folder`."""
    plot = draw(trained)
    write_json_atomically(folder / JSON, content)
    write_bytes_atomically(folder / MARKDOWN, markdown(content, trained).encode())
    write_bytes_atomically(folder / PLOT, plot.png)
    write_bytes_atomically(folder / PAGE, page(content, trained, plot).encode())


def terminal_table(trained: Sequence[Trained], *, narrow: bool) -> "Table":
    """The table for a terminal; narrow puts each interval under its score."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in HEADER:
        shown.add_column(name, justify="left" if name == "way" else "right", overflow="fold")
    for cells in _cells(rows_of(trained), narrow=narrow):
        shown.add_row(*(Text(cell) for cell in cells))
    return shown


def findings(trained: Sequence[Trained]) -> list[str]:
    """The verdicts in words, and plainly when the federation beats nobody."""
    verdicts = verdicts_of(trained)
    lines = [verdict.text for verdict in verdicts]
    if verdicts and not any(verdict.beats for verdict in verdicts):
        lines.insert(0, "On these data the federation does not pay: it beats no hospital alone.")
    return lines


def markdown(content: Mapping[str, Any], trained: Sequence[Trained]) -> str:
    """The comparison as Markdown."""
    lines = [
        f"# {plain(_title(content))}",
        "",
        *(f"{plain(line)}  " for line in _about(content)),
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{' --- |' * len(HEADER)}",
        *(f"| {' | '.join(plain(cell) for cell in cells)} |" for cells in _cells(rows_of(trained))),
        "",
        *(f"- {plain(line)}" for line in findings(trained)),
        *(f"- {plain(line)}" for line in _limits(content, trained)),
    ]
    return "\n".join(lines) + "\n"


def page(content: Mapping[str, Any], trained: Sequence[Trained], plot: Plot) -> str:
    """The comparison as one offline HTML file."""
    about = [tag("p", line, class_="soft") for line in _about(content)]
    caption = "On the same held-back test patients; in brackets 95 % intervals by bootstrap over patients."
    return document(
        _title(content),
        tag("header", tag("h1", _title(content)), *about),
        _banner(verdicts_of(trained)),
        section("Scores", "scores", table(caption, HEADER, _cells(rows_of(trained))), images([plot])),
        section("Findings", "findings", _list(findings(trained) or ["Nothing could be compared."])),
        section("Limits", "limits", _list(_limits(content, trained))),
    )


def draw(trained: Sequence[Trained]) -> Plot:
    """AUC of every way with its interval; of baselines the central ones."""
    shown = [t for t in trained if not t.way.baseline or t.way.kind == "central"]
    scored = [t for t in shown if t.metrics.get("auc") is not None]
    with canvas(width=7.0, height=1.4 + 0.3 * len(scored)) as (axes, render):
        for place, item in enumerate(scored):
            value, bounds = float(item.metrics["auc"] or 0), item.ci95.get("auc")
            colour = _COLOURS["baseline" if item.way.baseline else item.way.kind]
            if bounds is not None:
                axes.plot(bounds, (place, place), color=colour, linewidth=2)
            marker = "o" if item.way.epsilon is None else "D"
            axes.plot([value], [place], marker=marker, color=colour, markersize=6)
        axes.set_yticks(range(len(scored)), [short(item.way.title) for item in scored])
        axes.set(xlabel="test AUC, 95 % interval by patient", ylim=(len(scored) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        png = render()
    text = "; ".join(
        f"{t.way.title} {figure(t.metrics['auc'])} ({interval(t.ci95.get('auc'))})" for t in scored
    )
    alt = f"Dots with bars: {text}."
    return Plot(name="comparison", title="Test AUC (diamonds: private)", alt=alt, png=png)


def _banner(verdicts: Sequence[Verdict]) -> Html:
    """Whether the federation pays, in big letters."""
    if not verdicts:
        return Html("")
    beaten = sum(verdict.beats for verdict in verdicts)
    headline = {
        0: "The federation does not beat its members alone",
        len(verdicts): "The federation beats its members alone",
    }.get(beaten, "The federation beats its members alone in part")
    explanation = f"{beaten} of {len(verdicts)} comparisons by AUC are better beyond chance; all stand below."
    kind = "private" if beaten == len(verdicts) else "not-private plain"
    return tag("div", tag("strong", headline), tag("p", explanation), class_=f"banner {kind}", role="note")


def _title(content: Mapping[str, Any]) -> str:
    return f"{content['data']['name']}: alone, federated, central"


def _about(content: Mapping[str, Any]) -> list[str]:
    data, test = content["data"], content["test"]
    made = ["The images are generated by a program and show nobody."] if data["generated"] else []
    whose = f" of {test['units']} patients" if data["unit"] == "patient" else ""
    left_out = [f"Left out: {entry['name']}, {entry['reason']}." for entry in content["left_out"]]
    return [
        f"{len(content['hospitals'])} hospitals ({content['partition']}), model {content['model']}, seed "
        f"{content['seed']}; tested on {test['images']} images{whose} that nobody trained on.",
        *made,
        *left_out,
    ]


def _limits(content: Mapping[str, Any], trained: Sequence[Trained]) -> list[str]:
    lines = [
        "One seed: another partition, split or noise gives other numbers; the intervals hold only the chance "
        "of drawing these test patients.",
        "The best hospital alone is the best on these test patients, which favours it a little.",
        "Rows without an epsilon are not private.",
        "Research use only, not a medical device.",
    ]
    if any(t.way.baseline for t in trained):
        lines.insert(-1, _BASELINES)
    if (task := content["data"].get("task", CLASSIFICATION)) in _MEANS:
        lines.insert(0, _MEANS[task])
    if content["reproducible"]:
        lines.insert(0, "Reproducible: noise comes from the seed, so no row of this comparison is private.")
    return lines


def _cells(rows: Iterable[Row], *, narrow: bool = False) -> list[tuple[str, ...]]:
    cells = []
    for row in rows:
        if row.heading:
            cells.append((row.title, *[""] * (len(HEADER) - 1)))
            continue
        scores = [_scored(row.metrics.get(name), row.ci95.get(name), narrow=narrow) for name in SCORES]
        title = row.title + (f" ({row.note})" if row.note else "")
        cells.append((title, *scores, quantity(row.rounds), duration(row.seconds)))
    return cells


def _scored(value: float | None, bounds: tuple[float, float] | None, *, narrow: bool) -> str:
    if bounds is None:
        return figure(value)
    if narrow:
        return f"{figure(value)}\n{figure(bounds[0])}–{figure(bounds[1])}"
    return f"{figure(value)} ({interval(bounds)})"


def _list(lines: Iterable[str]) -> Html:
    return tag("ul", *(tag("li", line) for line in lines))
