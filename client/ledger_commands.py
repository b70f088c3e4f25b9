"""`flower-client ledger show|verify`: what was spent, and whether the ledger tells the truth.

Exit codes of verify: 0 everything is right, 1 findings, 2 the ledger cannot be used at all.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from common.errors import FederationError

if TYPE_CHECKING:
    from client.ledger import Ledger

ledger_app = typer.Typer(help="What was spent, and whether the ledger is right.", no_args_is_help=True)

Where = Annotated[
    Path, typer.Argument(help="hospital.toml, its folder, or the ledger's own folder.", show_default=True)
]
Format = Annotated[Literal["text", "json"], typer.Option("--format", help="text or json.")]
Delta = Annotated[float | None, typer.Option(help="Delta of the statement; by default the hospital's.")]


@ledger_app.command()
def show(where: Where = Path("hospital.toml"), delta: Delta = None, output: Format = "text") -> None:
    """Tell what the worst-off patient has spent, over all runs and per run."""
    try:
        folder, own_delta = _locate(where)
        ledger = _open(folder)
        spent = ledger.spent(delta or own_delta or _last_delta(ledger))
    except FederationError as error:
        _unusable(error, output)
    if output == "json":
        typer.echo(json.dumps({**asdict(spent), "private": spent.private}, indent=2))
        return
    typer.echo(spent.in_words())
    for run in spent.runs:
        cost = f"epsilon {run.epsilon:.4g}" if run.epsilon is not None else "NO PRIVACY CLAIMED"
        noise = f", noise multiplier {run.noise_multiplier:g}" if run.noise_multiplier else ""
        typer.echo(f"  {run.run_id}: {cost}, {run.rounds} round(s), {run.steps} step(s){noise}")


@ledger_app.command()
def verify(where: Where = Path("hospital.toml"), output: Format = "text") -> None:
    """Recompute every stored epsilon and hash; exit 0 if right, 1 with findings, 2 if unusable."""
    from client.ledger import Ledger

    try:
        folder, _ = _locate(where)
        ledger = Ledger.examine(folder)
        findings = ledger.verify()
        number = len(ledger.charges()) if not findings else None
    except FederationError as error:
        _unusable(error, output)
    if output == "json":
        found = [asdict(finding) for finding in findings]
        typer.echo(json.dumps({"ok": not findings, "charges": number, "findings": found}, indent=2))
    elif findings:
        for finding in findings:
            place = f" (charge {finding.charge})" if finding.charge else ""
            typer.echo(f"{finding.kind}: {finding.message}{place}")
        typer.echo(f"{len(findings)} finding(s): do not train with this ledger; restore its newest backup.")
    else:
        typer.echo(f"The ledger is right: {number} charge(s), chain intact, every epsilon recomputed.")
    if findings:
        raise typer.Exit(1)


def _open(folder: Path) -> "Ledger":
    from client.ledger import Ledger

    return Ledger.open(folder, create=False)


def _locate(where: Path) -> tuple[Path, float | None]:
    """The ledger's folder and the hospital's delta, if its configuration is at hand."""
    if (where / "ledger.sqlite").exists() or (where.is_dir() and not (where / "hospital.toml").exists()):
        return where, None
    from common.hospital_config import HospitalConfig
    from common.settings import load

    file = where / "hospital.toml" if where.is_dir() else where
    config = load(HospitalConfig, file)
    return config.ledger_folder(file.parent), config.delta


def _last_delta(ledger: "Ledger") -> float:
    charges = ledger.charges()
    return charges[-1].delta if charges else 1e-5


def _unusable(error: FederationError, output: str) -> NoReturn:
    if output == "json":
        answer: dict[str, Any] = {"what": error.what, "why": error.why, "fix": error.fix}
        typer.echo(json.dumps({"ok": False, "error": answer}, indent=2))
    else:
        typer.echo(str(error), err=True)
    raise typer.Exit(2)
