"""The plan as a picture: epsilon round by round, and the noise of other rounds and sampling rates."""

import io
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from client.planning.outlook import Outlook, run_noise
from client.planning.report import PlanReport
from common.privacy.accountant import epsilon

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 12
_STYLES = (("#0b6e99", "-", "o"), ("#c2571a", "--", "s"), ("#4d7c2e", "-.", "^"))


def plan_picture(report: PlanReport) -> bytes | None:
    """PNG of the plan; None where nothing private would be trained."""
    if report.outlook.plan is None or not report.outlook.study.claims_privacy:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10.5, 4.0), layout="constrained")
    FigureCanvasAgg(picture)
    spent, noise = picture.subplots(1, 2)
    _draw_spent(spent, report)
    _draw_noise(noise, report)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def spent_by_round(report: PlanReport) -> list[tuple[int, float]]:
    """(rounds, what the worst-off patient has spent): from before the run to its last round."""
    outlook = report.outlook
    if outlook.plan is None:
        return []
    rounds = sorted({round(outlook.rounds * point / _POINTS) for point in range(_POINTS + 1)})
    event = outlook.plan.event()
    runs = {count: replace(event, steps=event.steps * count) for count in rounds}
    histories = report.hospital.histories or [()]
    return [
        (count, max(epsilon([*history, run], delta=outlook.delta) for history in histories))
        for count, run in runs.items()
    ]


def _draw_spent(axes: "Axes", report: PlanReport) -> None:
    rounds, spent = zip(*spent_by_round(report), strict=True)
    colour, line, marker = _STYLES[0]
    axes.plot(rounds, spent, color=colour, linestyle=line, marker=marker, markersize=3.5)
    budget = report.outlook.budget
    axes.axhline(budget, color="#a3263a", linewidth=1, label=f"budget {budget:g}")
    axes.set(xlabel="rounds trained", ylabel="epsilon of the worst-off patient", ylim=(0, None))
    axes.set_title(f"noise multiplier {report.outlook.plan.noise_multiplier:g}")  # type: ignore[union-attr]
    _finish(axes)


def _draw_noise(axes: "Axes", report: PlanReport) -> None:
    """A line for each sampling rate, a point for each number of rounds."""

    def rate(outlook: Outlook) -> float:
        return outlook.study.privacy.sampling_rate

    drawn = [other for other in report.studies or [report.outlook] if other.plan]
    groups = itertools.groupby(sorted(drawn, key=rate), key=rate)
    for (value, group), (colour, line, marker) in zip(groups, itertools.cycle(_STYLES), strict=False):
        points = [
            (other.rounds, 100 * run_noise(other.plan, report.num_parameters, rounds=other.rounds))
            for other in group
            if other.plan
        ]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker=marker,
                  label=f"sampling rate {value:g}")  # fmt: skip
    axes.set(xlabel="rounds trained", ylabel="noise over the run, % of the longest update", ylim=(0, None))
    axes.set_title(f"at a budget of epsilon {report.outlook.budget:g}")
    _finish(axes)


def _finish(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e8ed")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
