"""`flower-server`: the operator's command line. Heavy imports wait until a command needs them.

From the command line: `flower-server --help`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from common.command_line import Output, OutputFormat, make_app, run_app, show
from common.errors import ConfigError
from server.deployment_commands import add_deployment_commands

HELP = """The federation server of hospital-federation.

Not the command of the same name that old releases of Flower had: it belongs to this project.

A federation in four steps: init DIR, enroll each hospital, check DIR, start DIR. Commands that take RUN mean,
without one, the current run of the federation in this folder or in --dir.

Exit codes: 0 done, 1 it failed (what, why and what to do are printed), 2 wrong usage or setting.
Of start and resume also: 3 stopped, 4 quorum lost, 5 budgets exhausted.
"""

NO_RUN = "no run yet: flower-server start begins one"

app = make_app(HELP)

Run = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="Folder of a run, or its id under runs/; else the current run."),
]
Runs = Annotated[Path | None, typer.Option(help="Folder that holds the runs.", show_default="runs")]
Dir = Annotated[Path | None, typer.Option("--dir", help="Folder of the federation.", show_default="here")]


def main() -> None:
    """Entry point of `flower-server`."""
    run_app(app)


add_deployment_commands(app)


@app.command()
def status(
    run: Run = None, runs: Runs = None, directory: Dir = None, output: Output = OutputFormat.TEXT
) -> None:
    """Say how far a run is and what its hospitals did last; without RUN also how server and hospitals are."""
    from server.provisioning.run_lookup import operator_folder

    folder = operator_folder(directory) if run is None else None
    if folder is None:
        _print_run(_overview(_folder(run, runs, directory)), output)
        return
    from server.provisioning.run_lookup import has_begun
    from server.provisioning.standing import lines_of, standing_of, table_of_roster

    standing = standing_of(folder)
    path = folder.run_folder()
    overview = _overview(path) if path is not None and has_begun(path) else {}
    if output is OutputFormat.JSON:
        _print_json(overview | standing)
        return
    for line in lines_of(standing):
        typer.echo(line)
    show(table_of_roster(standing))
    if overview:
        _print_run(overview, output)
    else:
        waits = f"the run {path.name} waits for its hospitals" if path is not None else NO_RUN
        typer.echo(waits)


@app.command()
def stop(run: Run = None, runs: Runs = None, directory: Dir = None) -> None:
    """Ask a run to end now; an open round is asked again when it is resumed, on the same charge."""
    from server.reporting.run_overview import RUNNING, state_of
    from server.reporting.run_record import STOP, read_run

    folder = _folder(run, runs, directory)
    record = read_run(folder)
    if (state := state_of(record)) != RUNNING:
        raise ConfigError(f"run {record.run_id} is not going on", why=f"its status is {state}")
    (folder / STOP).touch()
    typer.echo(f"asked run {record.run_id} to stop; an open round is asked again on resume")


@app.command("list")
def list_runs(runs: Runs = None, directory: Dir = None, output: Output = OutputFormat.TEXT) -> None:
    """List the runs in a folder, newest first."""
    from server.provisioning.run_lookup import runs_folder
    from server.reporting.run_overview import overview_of_runs, table_of_runs

    folder = runs_folder(directory=directory, runs=runs)
    overview = overview_of_runs(folder)
    if output is OutputFormat.JSON:
        _print_json(overview)
    elif not overview:
        typer.echo(f"no runs in {folder}")
    else:
        show(table_of_runs(overview))


@app.command()
def report(run: Run = None, runs: Runs = None, directory: Dir = None) -> None:
    """Write report.html, plots and MODEL_CARD.md from what the run folder holds."""
    from server.reporting.report import write_report

    typer.echo(write_report(_folder(run, runs, directory)))


@app.command()
def export(
    run: Run = None,
    *,
    out: Annotated[Path, typer.Option(help="New or existing folder for the files.")],
    runs: Runs = None,
    directory: Dir = None,
) -> None:
    """Copy the model to another folder: weights, model.json, model card and their hashes."""
    from server.reporting.export import export_model

    for path in export_model(_folder(run, runs, directory), out):
        typer.echo(path)


def _folder(run: str | None, runs: Path | None, directory: Path | None) -> Path:
    from server.provisioning.run_lookup import find_run

    return find_run(run, directory=directory, runs=runs)


def _overview(folder: Path) -> dict[str, Any]:
    from server.reporting.run_overview import overview_of_hospitals
    from server.reporting.run_record import read_run

    return overview_of_hospitals(read_run(folder))


def _print_run(overview: Mapping[str, Any], output: OutputFormat) -> None:
    from server.reporting.run_overview import summary_lines, table_of_hospitals

    if output is OutputFormat.JSON:
        _print_json(overview)
        return
    for line in summary_lines(overview):
        typer.echo(line)
    show(table_of_hospitals(overview))


def _print_json(content: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
