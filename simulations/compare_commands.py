"""`flower-simulate compare`."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from common.command_line import Output, OutputFormat
from common.errors import ConfigError
from simulations.flags import takes_scenario
from simulations.scenario import Scenario

if TYPE_CHECKING:
    from simulations.compare import Comparison

_WIDE = 118


def mount(app: typer.Typer) -> None:
    """Add the command to `flower-simulate`."""
    app.command(name="compare")(takes_scenario(compare_ways))


def compare_ways(
    scenario: Scenario,
    epsilons: Annotated[
        str, typer.Option(metavar="E,E,...", help="Budgets for federated training; 1,3,8 without --epsilon.")
    ] = "",
    alone_private: Annotated[
        bool, typer.Option("--alone-private", help="Also every hospital alone under each epsilon.")
    ] = False,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Also logistic regression, SVM and random forest, without privacy."),
    ] = False,
    output: Output = OutputFormat.TEXT,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live tables.")] = False,
) -> None:
    """Train centrally, each hospital alone, federated, and federated under privacy, on the same split."""
    from common.exit_codes import ExitCode
    from simulations.compare import compare
    from simulations.run import say_on_stderr

    comparison = compare(
        scenario,
        epsilons=chosen_epsilons(scenario, epsilons),
        alone_private=alone_private,
        baselines=baselines,
        quiet=quiet or output is OutputFormat.JSON or not sys.stderr.isatty(),
        say=say_on_stderr,
    )
    if output is OutputFormat.JSON:
        typer.echo(json.dumps(comparison.content, indent=2, ensure_ascii=False))
    else:
        _print(comparison)
    if comparison.stopped:
        raise typer.Exit(int(ExitCode.STOPPED))


def chosen_epsilons(scenario: Scenario, text: str) -> tuple[float, ...]:
    """The budgets of `--epsilons`, else the one of `--epsilon`, else 1, 3 and 8. Raises ConfigError."""
    from simulations.compare import EPSILONS

    if not text:
        return EPSILONS if scenario.epsilon is None else (scenario.epsilon,)
    if scenario.epsilon is not None or not scenario.private:
        raise ConfigError(
            "--epsilons goes with neither --epsilon nor --private false", fix="give one of them"
        )
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < float("inf") for value in values):
        raise ConfigError(f"--epsilons {text!r} is no list of positive numbers", fix="write --epsilons 1,3,8")
    return values


def _print(comparison: "Comparison") -> None:
    from rich.console import Console

    from simulations.comparison_page import PAGE, findings, terminal_table

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(terminal_table(comparison.trained, narrow=console.width < _WIDE))
    for line in findings(comparison.trained):
        typer.echo(line)
    typer.echo(f"page: {comparison.folder / PAGE}")
