"""Round by hospital, in letters: who was aggregated, late, refused or failed."""

from collections.abc import Mapping

from common.pages.document import Plot, images
from common.pages.html import Html, section, table, tag
from server.reporting.round_lines import OUTCOMES
from server.reporting.run_history import participation_counts
from server.reporting.run_record import RunRecord

_LETTERS = {"aggregated": "T", "late": "L", "refused": "R", "invalid": "I", "failed": "F"}
_MEANINGS = {
    "aggregated": "trained, counted",
    "late": "answered after the round closed",
    "refused": "the hospital declined",
    "invalid": "the update failed a check",
    "failed": "no usable answer",
}
_GRID_COLUMNS, _GRID_ROUNDS, _GRID_HOSPITALS = 25, 200, 60


def participation_section(run: RunRecord, drawn: Mapping[str, Plot]) -> Html:
    """Who took part in which round, and why not; the picture where letters would fill a book."""
    if not run.participation:
        return section("Participation", "participation", tag("p", "No round has been played yet."))
    legend = "; ".join(f"{_LETTERS[outcome]} {_MEANINGS[outcome]}" for outcome in OUTCOMES)
    reasons = sorted({reply.code for reply in run.participation.values() if reply.code})
    counts = participation_counts(run).items()
    return section(
        "Participation",
        "participation",
        tag("p", f"{legend}; · not asked."),
        *([tag("p", f"Reasons given: {', '.join(reasons)}.")] if reasons else []),
        *(_grids(run) or [images([drawn.get("participation")])]),
        table("Rounds by outcome.", ("hospital", "outcomes"), counts),
    )


def _grids(run: RunRecord) -> list[Html]:
    """Round by hospital in letters, in pieces that fit on paper; not for runs that would fill a book."""
    names = list(dict.fromkeys(name for name, _ in run.participation))
    last = max(number for _, number in run.participation)
    if last > _GRID_ROUNDS or len(names) > _GRID_HOSPITALS:
        return []
    pieces = []
    for first in range(1, last + 1, _GRID_COLUMNS):
        rounds = range(first, min(first + _GRID_COLUMNS, last + 1))
        head = tag("tr", tag("th", "round", scope="col"), *(tag("th", str(n), scope="col") for n in rounds))
        rows = [
            tag("tr", tag("th", name, scope="row"), *(_grid_cell(run, name, n) for n in rounds))
            for name in names
        ]
        caption = tag("caption", f"Rounds {rounds[0]} to {rounds[-1]}")
        grid = tag("table", caption, tag("thead", head), tag("tbody", *rows), class_="grid")
        pieces.append(tag("div", grid, class_="scroll"))
    return pieces


def _grid_cell(run: RunRecord, name: str, number: int) -> Html:
    reply = run.participation.get((name, number))
    if reply is None:
        return tag("td", "·", class_="absent", title="not asked")
    outcome = reply.outcome if reply.outcome in _LETTERS else "failed"
    why = f": {reply.code}" if reply.code else ""
    return tag("td", _LETTERS[outcome], class_=outcome, title=f"{_MEANINGS[outcome]}{why}")
