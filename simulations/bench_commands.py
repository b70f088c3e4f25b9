"""`flower-simulate bench`."""

import json
import sys
from typing import Annotated

import typer

from common.command_line import Output, OutputFormat, print_table


def mount(app: typer.Typer) -> None:
    """Add the command to `flower-simulate`."""
    app.command(name="bench")(bench_machine)


def bench_machine(
    cases: Annotated[
        str, typer.Option(metavar="CASE,...", help="Steps as model:pixels:batch[:ragged]; default or all.")
    ] = "default",
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 takes every core.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Measured calls of each way.")] = 25,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Measure what privacy and federation cost on this machine, beside the alternatives."""
    from simulations.bench import STEP_COLUMNS, BenchSettings, bench, other_lines, step_rows
    from simulations.benchmarks.cases import parse_cases
    from simulations.benchmarks.machine import usable_cores

    settings = BenchSettings(cases=parse_cases(cases), threads=threads or usable_cores(), repeats=repeats)
    content = bench(settings, say=lambda line: print(f"measuring {line}", file=sys.stderr, flush=True))
    if output is OutputFormat.JSON:
        typer.echo(json.dumps(content, indent=2))
        return
    print_table(STEP_COLUMNS, step_rows(content))
    for line in other_lines(content):
        typer.echo(line)
