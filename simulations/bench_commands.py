"""`flower-simulate bench`."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.command_line import Output, OutputFormat, print_table

if TYPE_CHECKING:
    from simulations.bench import BenchSettings


def _optional(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, show_default=False)


Cases = Annotated[
    str | None, _optional("CASE,...", "Steps as model:pixels:batch[:ragged]; or default, or all.")
]
Only = Annotated[str | None, _optional("PART,...", "Of dp_step,wire,accuracy,server,engine,scale,startup.")]
Compiled = Annotated[
    str | None, _optional("MODEL,...", "Compile the twins of these models too: two minutes a case.")
]
Profile = Annotated[str | None, _optional("CASE,...", "Take these steps apart by layer.")]
Images = Annotated[Path | None, _optional("PATH", "Images for accuracy; without, generated ones.")]
Page = Annotated[
    Path | None, _optional("PAGE", "Put the figures into this Markdown page, raw numbers beside it.")
]


def mount(app: typer.Typer) -> None:
    """Add the command to `flower-simulate`."""
    app.command(name="bench")(bench_machine)


def bench_machine(
    cases: Cases = None,
    only: Only = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 takes every core.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Measured calls of each way.")] = 25,
    compiled: Compiled = None,
    profile: Profile = None,
    data: Images = None,
    full: Annotated[
        bool, typer.Option("--full", help="All of docs/benchmarks.md: about half an hour on two cores.")
    ] = False,
    write: Page = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Measure what privacy and federation cost on this machine, beside the alternatives.

    Without flags about three minutes on two cores. Nothing else should run meanwhile.
    """
    from simulations.bench import BenchSettings, full_settings, parse_parts
    from simulations.benchmarks.cases import parse_cases
    from simulations.benchmarks.machine import usable_cores
    from simulations.benchmarks.page import page_text, write_page

    threads = threads or usable_cores()
    settings = full_settings(threads=threads) if full else BenchSettings(threads=threads)
    settings = replace(settings, repeats=repeats, data=None if data is None else data.resolve())
    if only is not None:
        settings = replace(settings, parts=parse_parts(only))
    if cases is not None:
        settings = replace(settings, cases=parse_cases(cases))
    if compiled is not None:
        settings = replace(settings, compiled=tuple(compiled.split(",")))
    if profile is not None:
        settings = replace(settings, profiles=parse_cases(profile))
    if write is not None:
        page_text(write)
    content = _measured(settings)
    if write is not None:
        write_page(write, content)
    _show(content, output)
    if any("failed" in about for about in content["parts"].values()):
        raise typer.Exit(1)


def _measured(settings: "BenchSettings") -> dict[str, Any]:
    from simulations.bench import bench

    content = bench(settings, say=lambda line: print(f"measuring {line}", file=sys.stderr, flush=True))
    command = shlex.join(["flower-simulate", *sys.argv[1:]])
    for about in content["parts"].values():
        about["command"] = command
    return content | {"command": command}


def _show(content: dict[str, Any], output: OutputFormat) -> None:
    from simulations.benchmarks import tables

    if output is OutputFormat.JSON:
        typer.echo(json.dumps(content, indent=2))
        return
    if content.get("dp_step"):
        print_table(tables.STEP_COLUMNS, tables.step_rows(content))
    for profile in content.get("profile", ()):
        typer.echo(f"layers of {profile['case']}, milliseconds, {profile['twin']} -> ours")
        print_table(*tables.profile_table(profile))
    if rows := tables.figure_rows(content, only_measured=True):
        print_table(tables.FIGURE_COLUMNS, rows)
    for line in tables.other_lines(content):
        typer.echo(line)
