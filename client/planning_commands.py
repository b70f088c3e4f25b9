"""`flower-client plan`: what a run would cost, what it would be worth, and what other choices would give.

flower-client plan DIR                                        the study of enrolment.toml, on this ledger
flower-client plan DIR --rounds 40 --plot plan.png            the same with 40 rounds, also as a picture
flower-client plan --patients 940 --sampling-rate 0.1         before there is a hospital's folder
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.command_line import Output, OutputFormat, print_table

if TYPE_CHECKING:
    from client.planning.report import PlanReport

_Folder = Annotated[Path, typer.Argument(help="the hospital's folder; without one name --patients")]


def plan(
    folder: _Folder = Path(),
    patients: Annotated[int | None, typer.Option(help="enrolled patients (public count)")] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds of the run")] = None,
    local_steps: Annotated[int | None, typer.Option(help="steps of a round")] = None,
    sampling_rate: Annotated[float | None, typer.Option(help="share of patients in a step")] = None,
    l2_clip_norm: Annotated[float | None, typer.Option(help="bound on one patient's gradient")] = None,
    model: Annotated[str | None, typer.Option(help="name of the model")] = None,
    image_size: Annotated[int | None, typer.Option(help="side of the image in pixels")] = None,
    channels: Annotated[int | None, typer.Option(help="1 grey, 3 colour")] = None,
    epsilon: Annotated[float | None, typer.Option(help="budget instead of policy.epsilon")] = None,
    delta: Annotated[float | None, typer.Option(help="delta instead of the hospital's")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="this noise, as in mode fixed")] = None,
    without_ledger: Annotated[
        bool, typer.Option("--without-ledger", help="as for new patients; reads neither ledger nor images")
    ] = False,
    without_timing: Annotated[bool, typer.Option("--without-timing", help="measure no step")] = False,
    without_choices: Annotated[
        bool, typer.Option("--without-choices", help="only this plan, no tables")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="also draw it into this .png")] = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Plan a new run: noise, epsilon, what remains, minutes here, and other choices. Charges nothing.

    A flag replaces what the files say. Exit codes: 0 takes part, 1 would refuse, 2 settings or data unusable.
    """
    from rich.console import Console

    from client.planning.hospital import planned_hospital
    from client.planning.report import make_report, with_choices
    from client.planning.words import sentences

    _require_png(plot)
    hospital_changes: dict[str, Any] = {
        "hospital.enrolled-patients": patients,
        "policy.epsilon": epsilon,
        "policy.delta": delta,
        "policy.noise-multiplier": noise_multiplier,
        "policy.mode": None if noise_multiplier is None else "fixed",
    }
    study_changes: dict[str, Any] = {
        "federation.rounds": rounds,
        "privacy.local-steps": local_steps,
        "privacy.sampling-rate": sampling_rate,
        "privacy.l2-clip-norm": l2_clip_norm,
        "model.name": model,
        "data.image-size": image_size,
        "data.channels": channels,
    }
    with Console(stderr=True).status("") as shown:

        def say(part: str) -> None:
            shown.update(f"computing: {part}")

        hospital = planned_hospital(
            folder,
            hospital_changes=hospital_changes,
            study_changes=study_changes,
            with_ledger=not without_ledger,
            say=say,
        )
        report = make_report(hospital, timing=not without_timing, say=say)
        if output is OutputFormat.TEXT:
            typer.echo("\n".join(sentences(report)))
        report = report if without_choices else with_choices(report, say=say)
        if plot is not None:
            say("the picture")
            _draw(report, plot)
    if output is OutputFormat.TEXT:
        _print_tables(report)
    else:
        typer.echo(json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False))
    raise typer.Exit(1 if report.outlook.refusal else 0)


def _require_png(plot: Path | None) -> None:
    """Before minutes of work."""
    from common.errors import ConfigError

    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(
            f"--plot {plot} is no .png", why="the picture is a PNG", fix="write for example --plot plan.png"
        )


def _draw(report: "PlanReport", plot: Path) -> None:
    from client.planning.plot import plan_picture
    from common.files import write_bytes_atomically

    if (picture := plan_picture(report)) is not None:
        write_bytes_atomically(plot, picture)


def _print_tables(report: "PlanReport") -> None:
    from client.planning.words import tables

    for title, columns, rows in tables(report):
        typer.echo(f"\n{title}")
        print_table(columns, rows)
