"""The figures that have a bar, with what was measured: the rows of the table in docs/benchmarks.md."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simulations.benchmarks.cases import FIGURE_STEPS, StepCase

Content = Mapping[str, Any]
LARGE_UPDATE = 500_000
"""Parameters from which the bar on bytes holds."""
SEEDS = 5
"""Runs over which the bar on accuracy holds."""
MANY_HOSPITALS = 1000
"""Hospitals for which the bars on scale hold."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number and the bar that it must hold."""

    part: str
    """Part of the benchmark that measures it."""
    name: str
    bar: str
    """In words, for example `at most 1.5`."""
    measured: str
    """In words, or why there is no number."""
    holds: bool | None
    """None: not measured."""

    @property
    def verdict(self) -> str:
        """`yes`, `no` or `not measured`."""
        return "not measured" if self.holds is None else "yes" if self.holds else "no"


def figures_of(content: Content) -> list[Figure]:
    """All figures with a bar, in the order of the requirements; those that were not measured too."""
    steps = {step["case"]: step for step in content.get("dp_step", ())}
    cases = [StepCase.parse(text) for text in FIGURE_STEPS]
    return [
        *(_ratio(case, steps) for case in cases if case.model != "resnet18"),
        *(
            _of_step(case, steps, f"speedup_over_{other}", what, at_least=least)
            for other, what, least in (
                ("hooks", "times faster than Opacus hooks", 3.3),
                ("ghost", "times faster than Opacus ghost", 1.25),
            )
            for case in cases
            if case.model != "resnet18"
        ),
        *(_ratio(case, steps) for case in cases if case.model == "resnet18"),
        *(_ratio(case.with_ragged, steps) for case in cases),
        *(
            _of_step(one, steps, "memory_ratio", "peak memory of the step against the twin", at_most=1.5)
            for case in cases
            for one in (case, case.with_ragged)
        ),
        *_figures_of_wire(content),
        *_figures_of_server(content),
        *_figures_of_engine(content),
        *_figures_of_scale(content),
        *_figures_of_startup(content),
    ]


_BARS = {28: 1.5, 64: 1.4, 150: 1.3}
AIM = 1.10


def _ratio(case: StepCase, steps: Mapping[str, Content]) -> Figure:
    bar = 1.4 if case.ragged else 1.5 if case.model == "resnet18" else _BARS[case.image_size]
    figure = _of_step(case, steps, "ratio_to_sgd", "DP-SGD step against the twin", at_most=bar)
    if case.ragged or case.model == "resnet18":
        return figure
    return _with_bar(figure, f"{figure.bar}; aim {AIM:.2f}")


def _with_bar(figure: Figure, bar: str) -> Figure:
    return Figure(part=figure.part, name=figure.name, bar=bar, measured=figure.measured, holds=figure.holds)


def _of_step(
    case: StepCase,
    steps: Mapping[str, Content],
    key: str,
    what: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Figure:
    step = steps.get(case.name)
    return _figure(
        "dp_step",
        f"{case.name}: {what}",
        None if step is None else step[key],
        at_most=at_most,
        at_least=at_least,
        reason="" if step is None else _reason(step, key),
    )


def _reason(step: Content, key: str) -> str:
    if key == "memory_ratio":
        return str(step.get("memory_reason", ""))
    return str(step.get("not_measured", {}).get(key.removeprefix("speedup_over_"), ""))


def _figure(
    part: str,
    name: str,
    value: float | None,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    form: Callable[[float], str] = "{:.2f}".format,
    reason: str = "",
) -> Figure:
    limit, word, holds = (
        (at_most, "at most", operator.le) if at_most is not None else (at_least, "at least", operator.ge)
    )
    if limit is None:
        raise ValueError(f"{name} has no bar")
    return Figure(
        part=part,
        name=name,
        bar=f"{word} {form(limit)}",
        measured=(reason or "not measured") if value is None else form(value),
        holds=None if value is None else bool(holds(value, limit)),
    )


def _at(content: Content, *path: str) -> Any:
    """What stands at the path; None where a part was not measured."""
    value: Any = content
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _figures_of_wire(content: Content) -> Sequence[Figure]:
    large = {
        name: size
        for name, size in (content.get("wire") or {}).items()
        if isinstance(size, Mapping) and size.get("parameters", 0) >= LARGE_UPDATE
    }
    shown = "{:.3f}".format
    found = [
        _figure(
            "wire",
            f"bytes up per round against float32 at 8 bits, {name} ({size['parameters']:,} parameters)",
            size["ratio_to_float32"],
            at_most=0.26,
            form=shown,
        )
        for name, size in large.items()
    ]
    name = f"bytes up per round against float32 at 8 bits, models of {LARGE_UPDATE:,} parameters and more"
    difference = _at(content, "accuracy", "difference")
    return [
        *(found or [_figure("wire", name, None, at_most=0.26, form=shown)]),
        _figure(
            "accuracy",
            "final test AUC, mean over 5 seeds: how far 8 bits are from unquantised",
            None if difference is None or _at(content, "accuracy", "seeds") < SEEDS else abs(difference),
            at_most=0.003,
            form="{:.4f}".format,
        ),
    ]


def _figures_of_server(content: Content) -> Sequence[Figure]:
    memory = _at(content, "server", "memory") or {}
    millions = memory.get("parameters", 25_000_000) / 1e6
    size = f"{memory.get('hospitals', 100)} hospitals x {millions:g} M parameters"
    return [
        _figure(
            "server",
            f"server memory above its idle processes, SuperLink included, in models: {size}",
            memory.get("models_above_idle"),
            at_most=3.0,
        ),
        *(
            _figure(
                "server",
                f"reduction against numpy's a += w * b over as many bytes, {name}",
                _at(content, "server", key),
                at_least=0.60,
            )
            for name, key in (
                ("float32 updates", "throughput_ratio"),
                ("8-bit updates", "throughput_ratio_grid"),
            )
        ),
    ]


def _figures_of_engine(content: Content) -> Sequence[Figure]:
    return [
        _figure(
            "engine",
            "whole simulation, 10 hospitals x 5 rounds, cnn-small: times faster than `flwr run` on Ray",
            _at(content, "engine", "against_ray", "speedup"),
            at_least=5.0,
        )
    ]


def _figures_of_scale(content: Content) -> Sequence[Figure]:
    scale = content.get("scale") or {}
    # A short run takes fewer hospitals, and the bars are not for those.
    of_bar = scale if scale.get("hospitals") == MANY_HOSPITALS else {}
    name, peak = f"{MANY_HOSPITALS:,} hospitals x 2 rounds, 20 images each", of_bar.get("bytes_peak")
    return [
        _figure("scale", f"{name}: peak memory in GB", None if peak is None else peak / 1e9, at_most=3.0),
        _figure(
            "scale",
            f"{name}: time per hospital and round against the run with 100",
            of_bar.get("ratio_per_hospital_round"),
            at_most=1.3,
        ),
    ]


def _figures_of_startup(content: Content) -> Sequence[Figure]:
    commands = _at(content, "startup", "commands") or {}

    def slowest(ending: str) -> float | None:
        return max(
            (seconds["seconds"] for name, seconds in commands.items() if name.endswith(ending)), default=None
        )

    return [
        *(
            _figure(
                "startup",
                f"`{ending}`, the slowest of all commands, in seconds",
                slowest(ending),
                at_most=0.5,
            )
            for ending in ("--help", "status")
        ),
        _figure(
            "engine",
            "command to first training step of the embedded engine, in seconds",
            _at(content, "engine", "seconds_to_first_training_step"),
            at_most=5.0,
        ),
    ]
