"""`flower-simulate audit`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.command_line import Output, OutputFormat

if TYPE_CHECKING:
    from simulations.audits.catalogue import Audit
    from simulations.audits.finding import Finding

_NAMES = "neighbours, arithmetic, noise, sampling, accounting, canary, one-run, membership, inversion"
Began = Callable[["Audit"], None]
Ended = Callable[["Audit", "Finding"], None]


def mount(app: typer.Typer) -> None:
    """Add the command to `flower-simulate`."""
    app.command(name="audit")(audit_training)


def audit_training(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for audit.json and audit.html.")
    ] = Path("audit"),
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help=f"One of {_NAMES}; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller samples, about two minutes.")] = False,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Attack the training of this installation: does more leak than is claimed? Exit code 1 if so."""
    from simulations.audits.run import PAGE, chosen_audits, run_audits

    audits = chosen_audits(only or [])
    with _progress(len(audits)) as (began, ended):
        content = run_audits(audits, out, quick=quick, began=began, ended=ended)
    if output is OutputFormat.JSON:
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _print(content)
        typer.echo(f"report: {out / PAGE}")
    raise typer.Exit(0 if content["passed"] else 1)


@contextmanager
def _progress(count: int) -> Iterator[tuple[Began, Ended]]:
    """A bar on a terminal, a line for each audit elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        yield (lambda audit: None), _say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=count)

        def ended(audit: "Audit", finding: "Finding") -> None:
            bar.advance(task)

        yield (lambda audit: bar.update(task, description=audit.title)), ended


def _say(audit: "Audit", finding: "Finding") -> None:
    result = "passed" if finding.passed else "FAILED"
    print(f"{audit.title}: {result} ({finding.wall_s:.0f} s)", file=sys.stderr, flush=True)


def _print(content: dict[str, Any]) -> None:
    from common.command_line import print_table
    from simulations.audits.finding import CLAIMED, EMPIRICAL

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    rows = [
        (
            entry["title"],
            "passed" if entry["passed"] else "FAILED",
            cell(entry["numbers"].get(CLAIMED)),
            cell(entry["numbers"].get(EMPIRICAL)),
            f"{entry['wall_s']:.0f} s",
        )
        for entry in content["findings"]
    ]
    print_table(("audit", "result", "claimed epsilon", "proven epsilon", "time"), rows)
    for entry in content["findings"]:
        if not entry["passed"]:
            typer.echo(f"{entry['title']}: {entry['said']}")
