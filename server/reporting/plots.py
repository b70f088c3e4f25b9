"""The pictures of a run, one function each: None where the run has no numbers for it."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from common.files import write_bytes_atomically
from common.pages.document import Plot
from common.pages.html import bound, duration, figure, interval, size
from common.pages.style import COLOURS
from server.reporting.canvas import canvas, line_style, short, whole_ticks
from server.reporting.run_history import growths, participation_counts, round_seconds
from server.reporting.run_record import HospitalSummary, RunRecord

_MOST_LINES, _MOST_BARS, _MOST_NAMES = 8, 40, 60
_CURVES = {"auc": "AUC", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "f1": "F1"}


def draw_plots(run: RunRecord) -> list[Plot]:
    """Every plot that the run has numbers for."""
    plots = [draw(run) for draw in _PLOTS]
    return [plot for plot in plots if plot is not None]


def write_plots(folder: Path, plots: Sequence[Plot]) -> None:
    """Write `plots/<name>.png` under the run folder."""
    for plot in plots:
        write_bytes_atomically(folder / "plots" / f"{plot.name}.png", plot.png)


def learning_curves(run: RunRecord) -> Plot | None:
    """Scores of the global model over the rounds, as far as somebody scored them."""
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for point in run.learning_curve:
        for metric in _CURVES:
            if isinstance(value := point.get(metric), int | float) and math.isfinite(value):
                curves.setdefault((metric, str(point.get("split", "test"))), []).append(
                    (int(point["round"]), float(value))
                )
    if not curves:
        return None
    with canvas() as (axes, render):
        for index, ((metric, split), points) in enumerate(curves.items()):
            axes.plot(*zip(*points, strict=True), label=f"{_CURVES[metric]}, {split}", **line_style(index))
        axes.set(xlabel="round", ylabel="score")
        whole_ticks(axes)
        axes.legend(loc="lower right", fontsize=9)
        png = render()
    ends = ", ".join(
        f"{_CURVES[metric]} ({split}) from {figure(points[0][1])} in round {points[0][0]} to "
        f"{figure(points[-1][1])} in round {points[-1][0]}"
        for (metric, split), points in curves.items()
    )
    return Plot(name="learning_curves", title="Learning curves", alt=f"Line chart: {ends}.", png=png)


def roc(run: RunRecord) -> Plot | None:
    """ROC curve of the finding, or one per class against the rest."""
    curves = _roc_curves(run)
    if not curves:
        return None
    with canvas(height=4.4) as (axes, render):
        axes.plot([0, 1], [0, 1], color="#9aa5b1", linewidth=1, linestyle=":")
        for index, (name, (false_positives, true_positives)) in enumerate(curves.items()):
            style = line_style(index) | {"marker": ""}
            axes.plot(false_positives, true_positives, label=short(name), **style)
        axes.set(
            xlabel="false positive rate", ylabel="true positive rate (recall)", xlim=(0, 1), ylim=(0, 1.01)
        )
        axes.legend(loc="lower right", fontsize=9)
        png = render()
    area, bounds = run.test_metrics.get("auc"), interval(run.test_intervals.get("auc"))
    mean = "mean " if len(curves) > 1 else ""
    text = f"ROC curve of {', '.join(curves)} on the test split; {mean}area {figure(area)}"
    return Plot(
        name="roc", title="ROC", alt=text + (f" (95 % interval {bounds})." if bounds else "."), png=png
    )


def calibration(run: RunRecord) -> Plot | None:
    """What the model says against what is so, with the expected calibration error."""
    bins = run.test.get("calibration")
    if not isinstance(bins, dict) or not bins.get("mean_predicted"):
        return None
    said, so = bins["mean_predicted"], bins["fraction_positive"]
    counts = bins.get("count") or [1] * len(said)
    with canvas(height=4.4) as (axes, render):
        axes.plot([0, 1], [0, 1], color="#9aa5b1", linewidth=1, linestyle=":", label="perfectly calibrated")
        axes.plot(said, so, color=COLOURS[0], linewidth=1)
        largest = max(counts)
        axes.scatter(said, so, s=[20 + 160 * c / largest for c in counts], color=COLOURS[0], label="model")
        xlabel = "predicted probability" + (f" of {short(run.classes[-1])}" if len(run.classes) == 2 else "")
        axes.set(xlabel=xlabel, ylabel="observed share", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="upper left", fontsize=9)
        png = render()
    pairs = ", ".join(f"{figure(x, 2)} said {figure(y, 2)} so" for x, y in zip(said, so, strict=True))
    error = figure(run.test.get("ece"))
    return Plot(
        name="calibration",
        title=f"Calibration (expected calibration error {error})",
        alt=f"Reliability diagram, larger dots hold more images; expected error {error}; {pairs}.",
        png=png,
    )


def confusion(run: RunRecord) -> Plot | None:
    """Counts of true against predicted class."""
    rows = run.test.get("confusion")
    if not rows:
        return None
    classes = [str(name) for name in run.test.get("classes") or run.classes]
    side = max(3.6, 0.62 * len(classes) + 1.8)
    with canvas(width=side + 0.6, height=side) as (axes, render):
        axes.grid(visible=False)
        shares = [[cell / max(1, sum(row)) for cell in row] for row in rows]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in itertools.product(range(len(rows)), range(len(rows))):
            colour = "white" if shares[i][j] > 0.55 else "#1c2733"
            axes.text(
                j, i, f"{rows[i][j]}\n{100 * shares[i][j]:.0f} %", ha="center", va="center", color=colour
            )
        ticks = range(len(classes))
        axes.set_xticks(ticks, [short(name, 14) for name in classes], rotation=30, ha="right")
        axes.set_yticks(ticks, [short(name, 14) for name in classes])
        axes.set(xlabel="predicted", ylabel="true")
        png = render()
    cells = "; ".join(
        f"{true} as {said}: {rows[i][j]}" for i, true in enumerate(classes) for j, said in enumerate(classes)
    )
    return Plot(
        name="confusion", title="Confusion matrix", alt=f"True class as predicted class: {cells}.", png=png
    )


def epsilon_spent(run: RunRecord) -> Plot | None:
    """Epsilon of each hospital beside what its policy allows."""
    spenders = [h for h in run.hospitals if h.epsilon is not None and math.isfinite(h.epsilon)]
    if not run.private or not spenders:
        return None
    shown = sorted(spenders, key=lambda h: -float(h.epsilon or 0))[:_MOST_BARS]
    with canvas(height=1.4 + 0.34 * len(shown)) as (axes, render):
        places = list(range(len(shown)))[::-1]
        bars = axes.barh(places, [float(h.epsilon or 0) for h in shown], color=COLOURS[0], label="spent")
        axes.bar_label(bars, [f" {bound(h.epsilon)}" for h in shown], fontsize=9)
        budgets = [(h.budget, place) for h, place in zip(shown, places, strict=True) if h.budget is not None]
        if budgets:
            limits, heights = zip(*budgets, strict=True)
            axes.scatter(limits, heights, marker="|", s=260, color=COLOURS[1], label="budget")
        axes.set_yticks(places, [short(h.name) for h in shown])
        axes.set(xlabel="epsilon", ylim=(-0.7, len(shown) - 0.3))
        axes.margins(x=0.1)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9)
        png = render()
    more = f" The {len(shown)} that spent most of {len(spenders)}." if len(shown) < len(spenders) else ""
    text = ", ".join(_spent(h) for h in shown)
    return Plot(name="epsilon", title="Epsilon per hospital", alt=f"Bars: {text}.{more}", png=png)


def epsilon_growth(run: RunRecord) -> Plot | None:
    """How the epsilon of this run alone grew with the rounds in which a hospital trained."""
    if not run.private:
        return None
    curves: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, grown in growths(run).items():
        if grown:
            curves.setdefault(tuple(grown), []).append(name)
    if not curves:
        return None
    shown = dict(sorted(curves.items(), key=lambda item: -item[0][-1][1])[:_MOST_LINES])
    with canvas() as (axes, render):
        for index, (points, names) in enumerate(shown.items()):
            label = short(names[0]) + (f" and {len(names) - 1} alike" if len(names) > 1 else "")
            axes.plot(*zip(*points, strict=True), label=label, **line_style(index))
        axes.set(xlabel="round", ylabel="epsilon of this run")
        whole_ticks(axes)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=9)
        png = render()
    ends = "; ".join(
        f"{_listed(names)}: {bound(points[-1][1])} after round {points[-1][0]}"
        for points, names in shown.items()
    )
    title = "Epsilon over the rounds (this run alone)"
    return Plot(name="epsilon_growth", title=title, alt=f"Rising lines: {ends}.", png=png)


def participation(run: RunRecord) -> Plot | None:
    """Round by hospital: who was aggregated, late, refused or failed."""
    if not run.participation:
        return None
    row_of = {name: row for row, name in enumerate(dict.fromkeys(name for name, _ in run.participation))}
    names = list(row_of)
    rounds = max(number for _, number in run.participation)
    with canvas(height=min(12.0, 1.5 + 0.26 * len(names))) as (axes, render):
        axes.grid(visible=False)
        for outcome, marker, colour in _OUTCOME_MARKS:
            places = [
                (number, row_of[name])
                for (name, number), reply in run.participation.items()
                if reply.outcome == outcome
            ]
            if places:
                dots = max(4.0, min(60.0, 3000 / max(rounds, len(names))))
                x, y = zip(*places, strict=True)
                axes.scatter(x, y, marker=marker, s=dots, color=colour, label=outcome)
        labelled = range(0, len(names), -(-len(names) // _MOST_NAMES))
        axes.set_yticks(labelled, [short(names[row]) for row in labelled])
        axes.set(xlabel="round", ylim=(len(names) - 0.4, -0.6), xlim=(0.2, rounds + 0.8))
        whole_ticks(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize=9)
        png = render()
    text = _listed([f"{name} {counts}" for name, counts in participation_counts(run).items()], between="; ")
    return Plot(name="participation", title="Who took part", alt=f"Dots, round by hospital: {text}.", png=png)


def round_times(run: RunRecord) -> Plot | None:
    """Seconds of each round, and of its longest training."""
    rows = round_seconds(run)
    if not rows:
        return None
    rounds, whole, training = zip(*rows, strict=True)
    with canvas(height=3.4) as (axes, render):
        axes.plot(rounds, whole, label="whole round", **line_style(0))
        axes.plot(rounds, training, label="longest training in a hospital", **line_style(1))
        axes.set(xlabel="round", ylabel="seconds")
        whole_ticks(axes)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=9)
        png = render()
    bytes_up = sum(reply.bytes_up for reply in run.replies)
    text = f"Rounds took {duration(min(whole))} to {duration(max(whole))}; {size(bytes_up)} came up in all."
    return Plot(name="round_times", title="Time per round", alt=text, png=png)


_PLOTS: tuple[Callable[[RunRecord], Plot | None], ...] = (
    learning_curves,
    roc,
    calibration,
    confusion,
    epsilon_spent,
    epsilon_growth,
    participation,
    round_times,
)

_OUTCOME_MARKS = (
    ("aggregated", "s", "#4d7c2e"),
    ("late", "^", "#c98a00"),
    ("refused", "D", "#6b5bb5"),
    ("invalid", "P", "#c2571a"),
    ("failed", "X", "#a3263a"),
)


def _roc_curves(run: RunRecord) -> dict[str, tuple[list[float], list[float]]]:
    """Points by class; one curve for the finding when there are two classes."""
    points = run.test.get("roc")
    if not isinstance(points, dict):
        return {}
    if "fpr" in points:
        finding = run.classes[-1] if run.classes else "finding"
        return {finding: (points["fpr"], points["tpr"])} if points["fpr"] else {}
    return {
        str(name): (curve["fpr"], curve["tpr"])
        for name, curve in points.items()
        if isinstance(curve, dict) and curve.get("fpr")
    }


def _listed(texts: Sequence[str], *, between: str = ", ") -> str:
    """The texts, after sixty of them only how many more there are."""
    more = [f"{len(texts) - _MOST_NAMES} more"] if len(texts) > _MOST_NAMES else []
    return between.join([*texts[:_MOST_NAMES], *more])


def _spent(hospital: HospitalSummary) -> str:
    budget = "" if hospital.budget is None else f" of {hospital.budget:g}"
    return f"{hospital.name} {bound(hospital.epsilon)}{budget}"
