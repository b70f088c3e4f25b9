"""`flower-simulate ensemble`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from common.command_line import Output, OutputFormat, print_table

_SHOWN = ("auc", "accuracy", "recall", "f1")


def mount(app: typer.Typer) -> None:
    """Add the command to `flower-simulate`."""
    app.command(name="ensemble")(score_ensemble)


def score_ensemble(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Finished runs, two or more.")],
    out: Annotated[Path | None, typer.Option(help="New folder for ensemble.json.")] = None,
    stacking: Annotated[
        bool, typer.Option("--stacking", help="Also a regression fitted on validation patients: not private.")
    ] = False,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Average the models of runs on the same patients, score all of them, and add up what they cost."""
    from simulations.ensemble import ensemble

    content = ensemble(runs, stacking=stacking, out=out)
    if output is OutputFormat.JSON:
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(content)


def _print(content: dict[str, Any]) -> None:
    from common.pages.html import bound, figure, interval, tiny_bound

    together = [name for name in ("average", "stacking") if name in content]
    named = [*((member["run"], member) for member in content["members"])]
    named += [(name, content[name]) for name in together]
    rows = []
    for name, block in named:
        cells = [
            f"{figure(block['metrics'][score])} ({interval(block['ci95'][score]) or 'no interval'})"
            for score in _SHOWN
        ]
        rows.append((name, *cells))
    test = content["test"]
    print_table((f"{test['images']} test images of {test['units']} patients", *_SHOWN), rows)
    for name in together:
        against = content[name]["against"]
        typer.echo(
            f"{name} against the best member, {against['member']}: AUC difference "
            f"{figure(against['auc_difference'])}, 95 % interval {interval(against['ci95']) or 'none'}"
        )
    typer.echo("What all members together have cost the patients of each hospital:")
    for cost in content["privacy"]["hospitals"]:
        alone = ", ".join("no claim" if e is None else bound(e, 3) for e in cost["members"].values())
        whole = "NO PRIVACY: a member claims none"
        if cost["epsilon"] is not None:
            delta = "" if cost["delta"] is None else f" at delta {tiny_bound(cost['delta'])}"
            whole = f"epsilon {bound(cost['epsilon'], 3)}{delta}"
        if cost["validation_epsilon"] is not None:
            apart = " without the stacking" if "stacking" in content else ""
            whole += f", validation patients{apart} {bound(cost['validation_epsilon'], 3)}"
        typer.echo(f"  {cost['name']:<24}{whole}  (each alone: {alone})")
    if "stacking" in content:
        typer.echo(content["stacking"]["notice"])
