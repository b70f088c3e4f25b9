"""The pictures of how well a model decides: None where the run has no numbers for one.

All are about the held-back test split of a simulation. Each has a text that says the same.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from common.pages.document import Plot
from common.pages.html import figure, interval
from common.pages.style import COLOURS
from server.reporting.canvas import drawing, line_style, short
from server.reporting.run_record import RunRecord

_GUIDE: dict[str, Any] = {"color": "#9aa5b1", "linewidth": 1, "linestyle": ":"}
_MOST_HOSPITALS = 40
_SHOWN_RATES = ("sensitivity", "specificity")


def roc(run: RunRecord) -> Plot | None:
    """ROC curve of the finding with its 95 % band, or one curve per class against the rest."""
    curves = _roc_curves(run)
    if not curves:
        return None
    band = run.test.get("roc_band") if len(curves) == 1 else None
    with drawing(height=4.4) as (axes, renders):
        axes.plot([0, 1], [0, 1], **_GUIDE)
        if band:
            axes.fill_between(
                band["fpr"], band["low"], band["high"], color=COLOURS[0], alpha=0.18, linewidth=0,
                label="95 % band",
            )  # fmt: skip
        for index, (name, (false_positives, true_positives)) in enumerate(curves.items()):
            style = line_style(index) | {"marker": ""}
            axes.plot(false_positives, true_positives, label=short(name), **style)
        if (rates := _rates_at_point(run)) is not None:
            axes.plot(
                [1 - rates["specificity"]], [rates["recall"]], "o", color=COLOURS[1], label="operating point"
            )
        axes.set(
            xlabel="false positive rate", ylabel="true positive rate (recall)", xlim=(0, 1), ylim=(0, 1.01)
        )
        axes.legend(loc="lower right", fontsize=9)
        drawn = renders()
    area, bounds = run.test_metrics.get("auc"), interval(run.test_intervals.get("auc"))
    mean = "mean " if len(curves) > 1 else ""
    text = f"ROC curve of {', '.join(curves)} on the test split; {mean}area {figure(area)}"
    text += f" (95 % interval {bounds})." if bounds else "."
    if rates is not None:
        text += f" At the operating point {_rates_in_words(rates)}."
    return Plot(name="roc", title="ROC", alt=text, **drawn)


def precision_recall(run: RunRecord) -> Plot | None:
    """Precision over recall of the finding."""
    points = _mapping(run.test.get("precision_recall"))
    if not points.get("recall"):
        return None
    with drawing(height=4.4) as (axes, renders):
        axes.step(points["recall"], points["precision"], where="pre", color=COLOURS[0], label=_finding(run))
        rates = _rates_at_point(run)
        if rates is not None and rates.get("precision") is not None:
            axes.plot([rates["recall"]], [rates["precision"]], "o", color=COLOURS[1], label="operating point")
        axes.set(xlabel="recall (sensitivity)", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
        axes.legend(loc="lower left", fontsize=9)
        drawn = renders()
    area, bounds = run.test_metrics.get("average_precision"), run.test_intervals.get("average_precision")
    between = f" (95 % interval {interval(bounds)})" if interval(bounds) else ""
    text = f"Precision over recall of {_finding(run)} on the test split; average precision {figure(area)}"
    return Plot(name="precision_recall", title="Precision and recall", alt=f"{text}{between}.", **drawn)


def calibration(run: RunRecord) -> Plot | None:
    """What the model says against what is so, before and after recalibration."""
    bins = run.test.get("calibration")
    if not isinstance(bins, dict) or not bins.get("mean_predicted"):
        return None
    after = _mapping(run.test.get("recalibrated"))
    with drawing(height=4.4) as (axes, renders):
        axes.plot([0, 1], [0, 1], label="perfectly calibrated", **_GUIDE)
        _reliability(axes, bins, 0, "o", "model")
        if after:
            _reliability(axes, after["calibration"], 1, "s", "recalibrated")
        xlabel = "predicted probability" + (f" of {short(run.classes[-1])}" if len(run.classes) == 2 else "")
        axes.set(xlabel=xlabel, ylabel="observed share", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="upper left", fontsize=9)
        drawn = renders()
    said, so = bins["mean_predicted"], bins["fraction_positive"]
    pairs = ", ".join(f"{figure(x, 2)} said {figure(y, 2)} so" for x, y in zip(said, so, strict=True))
    error = figure(run.test.get("ece"))
    better = f" After recalibration the expected error is {figure(after['ece'])}." if after else ""
    return Plot(
        name="calibration",
        title=f"Calibration (expected calibration error {error})",
        alt=f"Reliability diagram, larger dots hold more images; expected error {error}; {pairs}.{better}",
        **drawn,
    )


def confusion(run: RunRecord) -> Plot | None:
    """Counts of true against predicted class, the most probable one."""
    return _matrix(run, run.test.get("confusion"), "confusion", "Confusion matrix")


def confusion_at_point(run: RunRecord) -> Plot | None:
    """The same where the finding is called from the operating point on."""
    point = _mapping(run.test.get("at_operating_point"))
    title = f"Confusion matrix at the operating point ({figure(point.get('threshold'))})"
    return _matrix(run, point.get("confusion"), "confusion_at_point", title)


def thresholds(run: RunRecord) -> Plot | None:
    """Sensitivity and specificity over the threshold."""
    curve, point = _mapping(run.test.get("thresholds")), _mapping(run.test.get("at_operating_point"))
    if not curve or not all(_known(curve[name]) for name in _SHOWN_RATES):
        return None
    with drawing() as (axes, renders):
        for index, name in enumerate(_SHOWN_RATES):
            axes.plot(curve["threshold"], curve[name], label=name, **(line_style(index) | {"marker": ""}))
        if point:
            axes.axvline(point["threshold"], color=COLOURS[7], linewidth=1.2, label="operating point")
        axes.axvline(0.5, **_GUIDE)
        axes.set(xlabel="threshold", ylabel="rate", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="lower center", fontsize=9)
        drawn = renders()
    ends = "; ".join(
        f"from {at:g} on sensitivity {figure(curve['sensitivity'][place])}, "
        f"specificity {figure(curve['specificity'][place])}"
        for place, at in enumerate(curve["threshold"])
        if at in (0.1, 0.3, 0.5, 0.7, 0.9)
    )
    chosen = f" The operating point is {figure(point['threshold'])}." if point else ""
    title = "Sensitivity and specificity over the threshold"
    return Plot(name="thresholds", title=title, alt=f"Two lines: {ends}.{chosen}", **drawn)


def forest(run: RunRecord) -> Plot | None:
    """AUC of each hospital's own kind of test patients with its interval, the worst on top."""
    scored = {
        str(name): values
        for name, values in _mapping(run.evaluation.get("hospitals")).items()
        if _mapping(values).get("auc") is not None
    }
    if not scored:
        return None
    shown = sorted(scored, key=lambda name: float(scored[name]["auc"]))[:_MOST_HOSPITALS]
    rows = [(name, scored[name]["auc"], _bounds(scored[name])) for name in shown]
    if run.test_metrics.get("auc") is not None:
        rows.append(("all", run.test_metrics["auc"], run.test_intervals.get("auc")))
    with drawing(height=1.4 + 0.3 * len(rows)) as (axes, renders):
        for place, (name, area, bounds) in enumerate(rows):
            style: dict[str, Any] = {"color": COLOURS[1 if name == "all" else 0], "linewidth": 1.6}
            if bounds:
                axes.plot(bounds, [place, place], **style)
            axes.plot([area], [place], "D" if name == "all" else "o", **style)
        axes.set_yticks(range(len(rows)), [short(name) for name, _, _ in rows])
        axes.set(xlabel="AUC, with 95 % interval", ylim=(len(rows) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
        drawn = renders()
    words = "; ".join(
        f"{name} {figure(area)}" + (f" ({interval(bounds)})" if interval(bounds) else "")
        for name, area, bounds in rows
    )
    alt = f"AUC by hospital, the lowest first: {words}."
    return Plot(name="forest", title="AUC by hospital", alt=alt, **drawn)


EVALUATION_PLOTS: tuple[Callable[[RunRecord], Plot | None], ...] = (
    roc,
    precision_recall,
    calibration,
    confusion,
    confusion_at_point,
    thresholds,
    forest,
)


def _matrix(run: RunRecord, rows: Any, name: str, title: str) -> Plot | None:
    if not rows:
        return None
    classes = [str(label) for label in run.test.get("classes") or run.classes]
    side = max(3.6, 0.62 * len(classes) + 1.8)
    with drawing(width=side + 0.6, height=side) as (axes, renders):
        axes.grid(visible=False)
        shares = [[cell / max(1, sum(row)) for cell in row] for row in rows]
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in itertools.product(range(len(rows)), range(len(rows))):
            colour = "white" if shares[i][j] > 0.55 else "#1c2733"
            text = f"{rows[i][j]}\n{100 * shares[i][j]:.0f} %"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour)
        ticks = [place + 0.5 for place in range(len(classes))]
        axes.set_xticks(ticks, [short(label, 14) for label in classes], rotation=30, ha="right")
        axes.set_yticks(ticks, [short(label, 14) for label in classes])
        axes.set(xlabel="predicted", ylabel="true", ylim=(len(classes), 0))
        drawn = renders()
    cells = "; ".join(
        f"{true} as {said}: {rows[i][j]}" for i, true in enumerate(classes) for j, said in enumerate(classes)
    )
    return Plot(name=name, title=title, alt=f"True class as predicted class: {cells}.", **drawn)


def _reliability(axes: Any, bins: Mapping[str, Any], index: int, marker: str, label: str) -> None:
    said, so = bins["mean_predicted"], bins["fraction_positive"]
    counts = bins.get("count") or [1] * len(said)
    axes.plot(said, so, color=COLOURS[index], linewidth=1)
    sizes = [20 + 160 * count / max(counts) for count in counts]
    axes.scatter(said, so, s=sizes, color=COLOURS[index], marker=marker, label=label)


def _roc_curves(run: RunRecord) -> dict[str, tuple[list[float], list[float]]]:
    """Points by class; one curve for the finding when there are two classes."""
    points = run.test.get("roc")
    if not isinstance(points, dict):
        return {}
    if "fpr" in points:
        return {_finding(run): (points["fpr"], points["tpr"])} if points["fpr"] else {}
    return {
        str(name): (curve["fpr"], curve["tpr"])
        for name, curve in points.items()
        if isinstance(curve, dict) and curve.get("fpr")
    }


def _finding(run: RunRecord) -> str:
    return run.classes[-1] if run.classes else "finding"


def _rates_at_point(run: RunRecord) -> Mapping[str, float] | None:
    """The rates at the operating point where both of its coordinates are known."""
    rates = _mapping(_mapping(run.test.get("at_operating_point")).get("metrics"))
    return rates if _known([rates.get("recall"), rates.get("specificity")]) else None


def _rates_in_words(rates: Mapping[str, float]) -> str:
    return f"recall {figure(rates['recall'])}, specificity {figure(rates['specificity'])}"


def _bounds(scores: Mapping[str, Any]) -> Any:
    return _mapping(scores.get("ci95")).get("auc")


def _known(values: Any) -> bool:
    return all(value is not None for value in values)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
