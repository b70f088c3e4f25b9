"""What the three commands share: the look of `--help`, `--format`, `--debug`, and errors in three lines.

Exit codes: 0 done, 1 failed, 2 a setting or the data cannot be used; commands add their own above.
"""

import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
import typer.core

from common.errors import ConfigError, DataError, FederationError, ModelError

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH_IN_A_PIPE = 200
# Help is plain text (`rich_markup_mode=None`): typer would load all of rich only to escape brackets in it.
typer.core.HAS_RICH = False


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
        import importlib.metadata

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


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    """A table whose cells are never cut: a fingerprint must be readable to its end."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        # Text, not markup: a name such as "[red]" stays what it is.
        table.add_row(*(Text(cell) for cell in row))
    return table


def show(table: "Table") -> None:
    """Print a table; in a pipe there is no edge to break lines at."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _WIDTH_IN_A_PIPE).print(table)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows as a table."""
    show(plain_table(columns, rows))
