"""What the three commands share: the look of `--help`, `--format`, `--debug`, and errors in three lines.

Exit codes: 0 done, 1 failed, 2 a setting or the data cannot be used; commands add their own above.
"""

import importlib.metadata
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Annotated

import typer

from common.errors import ConfigError, DataError, FederationError, ModelError


class OutputFormat(StrEnum):
    """How results are printed: `text` for people, `json` for programs."""

    TEXT = "text"
    JSON = "json"


Output = Annotated[OutputFormat, typer.Option("--format", help="text for people, json for programs.")]


def make_app(help_text: str) -> typer.Typer:
    """A typer application with `--debug` and `--version`."""
    app = typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_common_options)
    return app


def _common_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    if version:
        typer.echo(f"hospital-federation {importlib.metadata.version('hospital-federation')}")
        raise typer.Exit


def run_app(app: typer.Typer) -> None:
    """Run a command; an error of ours is three lines on stderr, a traceback only with `--debug`."""
    try:
        # `--debug` may stand anywhere: nobody wants to learn where.
        app([argument for argument in sys.argv[1:] if argument != "--debug"])
    except (FederationError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        print(_in_words(error), file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError | DataError | ModelError) else 1) from None


def _in_words(error: FederationError | OSError) -> str:
    if isinstance(error, FederationError):
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows as a table that fits the terminal; whole lines where there is none."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    console.print(table, soft_wrap=not console.is_terminal)
