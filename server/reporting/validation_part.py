"""What the hospitals' noised counts about their validation patients say, for the page and the card."""

from collections.abc import Mapping

from common.pages.html import Html, bound, figure, section, table, tag, tiny_bound
from server.reporting.round_lines import number
from server.reporting.run_record import RunRecord

VALIDATION_HEADER = ("score", "value", "noise")


def validation_rows(run: RunRecord, names: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Score, value and the standard deviation of its noise; empty where no hospital has released counts.

    `names` are the scores to show, in order, and what a person calls them.
    """
    noise = run.validation.get("noise")
    deviations = noise if isinstance(noise, dict) else {}
    return [
        (shown, figure(number(run.validation[name])), figure(number(deviations.get(name))))
        for name, shown in names.items()
        if number(run.validation.get(name)) is not None
    ]


def validation_note(run: RunRecord) -> str:
    """Who was counted, that it is noised, and what it cost."""
    counted, left_out = run.validation.get("hospitals"), run.validation.get("left_out")
    who = f"{len(counted)} hospitals" if isinstance(counted, list) else "the hospitals"
    without = f" ({len(left_out)} gave none)" if isinstance(left_out, dict) and left_out else ""
    cost = number(run.validation.get("epsilon"))
    if not run.private or cost is None:
        paid = "No privacy is claimed for these counts."
    else:
        paid = (
            f"The counts left the hospitals with noise; together with earlier ones of this run they cost a "
            f"validation {run.unit} epsilon {bound(cost, 3)} at most, at delta "
            f"{tiny_bound(number(run.validation.get('delta')))}. Validation {run.unit}s do not train."
        )
    return (
        f"Sums of counts of {who}{without} over their own validation {run.unit}s. {paid} The last column is "
        "the standard deviation that the noise alone gives a score; chance in who the patients are comes "
        "on top."
    )


def validation_section(run: RunRecord, names: Mapping[str, str]) -> Html:
    """The part of the page; empty where no hospital has released counts."""
    rows = validation_rows(run, names)
    if not rows:
        return Html("")
    scores = table("Final model.", VALIDATION_HEADER, rows)
    return section("Validation at the hospitals", "validation", tag("p", validation_note(run)), scores)
