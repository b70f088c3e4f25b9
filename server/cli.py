"""`flower-server`: the operator's command line. Heavy imports wait until a command needs them.

From the command line: `flower-server --help`.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from common.command_line import Output, OutputFormat, make_app, run_app
from common.errors import ConfigError

HELP = """The federation server of hospital-federation.

Not the command of the same name that old releases of Flower had: it belongs to this project and works on its
run folders. Commands that deploy a federation of real hospitals come with the real-hospital release.

Exit codes: 0 done, 1 it failed (what, why and what to do are printed), 2 wrong usage or setting.
"""

app = make_app(HELP)

Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or the id of a run under runs/.")]
Runs = Annotated[Path, typer.Option(help="Folder that holds the runs.")]


def main() -> None:
    """Entry point of `flower-server`."""
    run_app(app)


@app.command("list")
def list_runs(runs: Runs = Path("runs"), output: Output = OutputFormat.TEXT) -> None:
    """List the runs in a folder, newest first."""
    from server.reporting.run_overview import overview_of_runs, table_of_runs

    overview = overview_of_runs(runs)
    if output is OutputFormat.JSON:
        _print_json(overview)
    elif not overview:
        typer.echo(f"no runs in {runs}")
    else:
        _print(table_of_runs(overview))


@app.command()
def status(run: Run, runs: Runs = Path("runs"), output: Output = OutputFormat.TEXT) -> None:
    """Say how far a run is and what its hospitals did last."""
    from server.reporting.run_overview import overview_of_hospitals, summary_lines, table_of_hospitals
    from server.reporting.run_record import read_run

    overview = overview_of_hospitals(read_run(_folder(run, runs)))
    if output is OutputFormat.JSON:
        _print_json(overview)
    else:
        for line in summary_lines(overview):
            typer.echo(line)
        _print(table_of_hospitals(overview))


@app.command()
def report(run: Run, runs: Runs = Path("runs")) -> None:
    """Write report.html, plots and MODEL_CARD.md from what the run folder holds."""
    from server.reporting.report import write_report

    typer.echo(write_report(_folder(run, runs)))


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="New or existing folder for the files.")],
    runs: Runs = Path("runs"),
) -> None:
    """Copy the model to another folder: weights, model.json, model card and their hashes."""
    from server.reporting.export import export_model

    for path in export_model(_folder(run, runs), out):
        typer.echo(path)


@app.command()
def stop(run: Run, runs: Runs = Path("runs")) -> None:
    """Ask a run to end when its present round closes."""
    from server.reporting.run_overview import RUNNING, state_of
    from server.reporting.run_record import STOP, read_run

    folder = _folder(run, runs)
    record = read_run(folder)
    if (state := state_of(record)) != RUNNING:
        raise ConfigError(f"run {record.run_id} is not going on", why=f"its status is {state}")
    (folder / STOP).touch()
    typer.echo(f"asked run {record.run_id} to stop; it ends when the present round closes")


def _folder(run: str, runs: Path) -> Path:
    """The folder of a run that was named by path or by id."""
    named = Path(run)
    by_id = runs / run
    return by_id if not named.is_dir() and by_id.is_dir() else named


def _print_json(content: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def _print(table: Any) -> None:
    from rich.console import Console

    # In a pipe there is no edge to break lines at.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    main()
