"""`flower-client purge`: remove what the hospital keeps for longer than its [retention] settings say.

flower-client purge DIR --dry-run     what would go
flower-client purge DIR               let it go; the ledger always stays
flower-client purge DIR --run RUN     everything that is kept of one run that is over
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.command_line import Output, OutputFormat, print_table

if TYPE_CHECKING:
    from client.retention import Removal

_HERE = Path()


def purge(
    folder: Annotated[Path, typer.Argument(help="the hospital's folder, with hospital.toml")] = _HERE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    run: Annotated[str, typer.Option(help="remove all that is kept of this run, whatever its age")] = "",
    output: Output = OutputFormat.TEXT,
) -> None:
    """Remove old answers, decoded images, log lines and models by [retention]; the ledger always stays."""
    from client.deployment.hospital_folder import HospitalFolder
    from client.retention import everything_of, outdated, remove, while_no_client_runs

    hospital = HospitalFolder(folder)
    keep, folders = hospital.config.retention, hospital.kept
    with while_no_client_runs(hospital.state) as is_alone:
        found = everything_of(folders, run) if run else outdated(folders, keep, with_logs=is_alone)
        if not dry_run:
            remove(found, keep)
    _print(found, dry_run=dry_run, output=output)
    if not is_alone and output is OutputFormat.TEXT and not run:
        typer.echo("The client is running: its logs are trimmed when it starts next.")


def _print(found: list["Removal"], *, dry_run: bool, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        rows = [
            {"kind": r.kind, "path": str(r.path), "bytes": r.num_bytes, "age_days": round(r.age_days, 1)}
            for r in found
        ]
        typer.echo(json.dumps({"dry_run": dry_run, "removed": rows}, indent=2, ensure_ascii=False))
        return
    if not found:
        typer.echo("Nothing is older than [retention] allows.")
        return
    print_table(
        ("what", "bytes", "days", "file"),
        [(r.kind, str(r.num_bytes), f"{r.age_days:.0f}", str(r.path)) for r in found],
    )
    typer.echo("Nothing was removed (--dry-run)." if dry_run else f"Removed {len(found)}.")
