"""A plan as a person reads it: sentences and tables."""

from collections.abc import Iterator

from client.planning.outlook import Outlook, run_noise, update_noise
from client.planning.report import PlanReport

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, columns, rows."""


def sentences(report: PlanReport) -> Iterator[str]:
    """The plan in words."""
    hospital, knobs = report.hospital, report.hospital.study.privacy
    federation, data = hospital.study.federation, hospital.study.data
    config = hospital.config
    yield (
        f"{config.hospital.name}: your {config.hospital.enrolled_patients} {hospital.unit}s, sampling "
        f"rate {knobs.sampling_rate:g}, {federation.rounds} rounds of {knobs.local_steps} step(s), clip "
        f"{knobs.l2_clip_norm:g}, model {hospital.study.model.name} ({report.num_parameters} weights) on "
        f"{data.image_size} px{f', {data.series_form.words}' if data.series_form.is_series else ''}."
    )
    yield f"The study is that of {hospital.study_from}. Ledger: {hospital.ledger}."
    if hospital.unit == "image":
        yield "One image is protected, not one patient: a patient with ten images ten times less."
    yield from _privacy(report)
    yield _time(report)


def _privacy(report: PlanReport) -> Iterator[str]:
    outlook, config = report.outlook, report.hospital.config
    if outlook.refusal:
        yield f"REFUSED: this hospital would not take part. {outlook.refusal}."
        if outlook.fix:
            yield f"What to do: {outlook.fix}."
        return
    plan, afforded, after = outlook.plan, report.afforded, outlook.epsilon_after
    if plan is None or afforded is None or after is None:
        yield f"NO PRIVACY: {outlook.rounds} rounds would be trained, and nothing is guaranteed."
        return
    how = "given" if config.policy.mode == "fixed" else "solved for the budget"
    yield (
        f"Noise multiplier {plan.noise_multiplier:g} ({how}). {outlook.rounds} rounds cost epsilon "
        f"{outlook.epsilon:.4g} at delta {outlook.delta:.3g}."
    )
    if outlook.rounds < outlook.study.federation.rounds:
        yield (
            f"Then the budget is spent: this hospital leaves after round {outlook.rounds}, the others "
            f"go on to {outlook.study.federation.rounds}."
        )
    if config.policy.run_epsilon is not None:
        yield f"One run may cost epsilon {config.policy.run_epsilon:g} at most (policy.run-epsilon)."
    yield (
        f"Budget: epsilon {outlook.budget:g} for the worst-off patient; spent before "
        f"{report.spent_before:.4g}, afterwards {after:.4g}, so {outlook.budget - after:.2g} remains."
    )
    fit = "or more, the policy's ceiling, " if afforded.is_ceiling else ""
    yield f"With this noise {afforded.rounds} rounds {fit}fit what is left before this run."
    yield (
        f"Noise in one update: {_share(update_noise(plan, report.num_parameters))} of the longest update "
        f"that the clip allows; in the mean over the run "
        f"{_share(run_noise(plan, report.num_parameters, rounds=outlook.rounds))}. Averaging over several "
        "hospitals lowers it by the square root of their number."
    )


def _time(report: PlanReport) -> str:
    minutes = report.minutes(report.outlook)
    if report.step is None or minutes is None:
        return f"Time: {report.no_step}."
    return (
        f"Time: about {_minutes(minutes)} of training on this machine "
        f"({report.step.seconds:.2g} s for a measured private step on {report.step.device})."
    )


def tables(report: PlanReport) -> Iterator[Table]:
    """What other choices would give; `>` marks the plan itself."""
    if report.studies:
        yield "Other rounds and sampling rates", _columns("sampling rate"), _study_rows(report)
    if report.budgets:
        yield "Other budgets, with noise solved for each", _columns("budget"), _budget_rows(report)
    if report.noises:
        columns = ("", "noise multiplier", "rounds that fit", "noise in an update", "over these rounds")
        yield "How many rounds fit what is left", columns, _noise_rows(report)


def _columns(varied: str) -> tuple[str, ...]:
    numbers = ("noise multiplier", "epsilon", "noise in an update", "over the run", "minutes")
    return ("", "rounds", varied, *numbers, "")


def _study_rows(report: PlanReport) -> list[tuple[str, ...]]:
    return [_row(report, other, f"{other.study.privacy.sampling_rate:g}") for other in report.studies]


def _budget_rows(report: PlanReport) -> list[tuple[str, ...]]:
    return [_row(report, other, f"{other.budget:g}") for other in report.budgets]


def _row(report: PlanReport, other: Outlook, varied: str) -> tuple[str, ...]:
    asked, minutes = other.study.federation.rounds, report.minutes(other)
    mark = ">" if other == report.outlook else ""
    if other.plan is None:
        return (mark, str(asked), varied, "", "", "", "", "", f"refused: {other.refusal}")
    return (
        mark,
        str(asked),
        varied,
        f"{other.plan.noise_multiplier:.4g}",
        f"{other.epsilon:.3g}",
        _share(update_noise(other.plan, report.num_parameters)),
        _share(run_noise(other.plan, report.num_parameters, rounds=other.rounds)),
        "" if minutes is None else f"{minutes:.2g}",
        f"leaves after round {other.rounds}" if other.rounds < asked else "",
    )


def _noise_rows(report: PlanReport) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for found in report.noises:
        over = run_noise(found.plan, report.num_parameters, rounds=found.rounds) if found.rounds else None
        rows.append(
            (
                ">" if found == report.afforded else "",
                f"{found.plan.noise_multiplier:.4g}",
                f"{found.rounds}{' (policy)' if found.is_ceiling else ''}",
                _share(update_noise(found.plan, report.num_parameters)),
                "" if over is None else _share(over),
            )
        )
    return rows


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _minutes(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.2g} seconds"
    return f"{minutes:.2g} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"
