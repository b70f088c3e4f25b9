"""`flower-client certificate verify|show`: check a release certificate offline, and list one's own.

Exit codes of verify: 0 everything that was checked is right, 1 something is not, 2 a file cannot be used.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.command_line import Output, OutputFormat, print_table
from common.errors import ConfigError

if TYPE_CHECKING:
    from common.statements import Statement

certificate_app = typer.Typer(
    help="What hospitals have signed about a run and its model.", no_args_is_help=True, rich_markup_mode=None
)


@certificate_app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="certificate.json of a hospital")],
    key: Annotated[Path | None, typer.Option(help="the hospital's public key (*.pub), to compare")] = None,
    fingerprint: Annotated[str, typer.Option(help="or its fingerprint, SHA256:...")] = "",
    model: Annotated[Path | None, typer.Option(help="model.safetensors that it must be about")] = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Check signature and signer, recompute every epsilon from the listed events; needs no network."""
    from client.certificate_check import check_certificate, read_certificate
    from common.node_keys import load_public_key

    if key is not None and fingerprint:
        raise ConfigError("--key and --fingerprint say the same", fix="give one of them")
    wanted = load_public_key(key).fingerprint if key is not None else fingerprint or None
    statement, parts = check_certificate(read_certificate(file), fingerprint=wanted, model=model)
    ok = all(part.ok for part in parts)
    if output is OutputFormat.JSON:
        checks = [{"part": part.part, "ok": part.ok, "result": part.result} for part in parts]
        typer.echo(json.dumps({"ok": ok, "checks": checks, "certificate": _document(statement)}, indent=2))
    else:
        if statement is not None:
            _print_content(statement.content)
        print_table(("part", "", "result"), [(p.part, "ok" if p.ok else "WRONG", p.result) for p in parts])
        typer.echo("The certificate holds." if ok else "The certificate does NOT hold.")
    raise typer.Exit(0 if ok else 1)


@certificate_app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="the hospital's folder, or its state folder")] = Path("."),
    run: Annotated[str, typer.Argument(help="only the certificate of this run")] = "",
    output: Output = OutputFormat.TEXT,
) -> None:
    """Show what this hospital has certified, run by run."""
    from client.certificate_check import CERTIFICATE, read_certificate
    from common.statements import verify_statement

    found = sorted(_state(folder).glob(f"models/*/{CERTIFICATE}"))
    chosen = [path for path in found if not run or path.parent.name == run]
    if run and not chosen:
        raise ConfigError(
            f"there is no certificate of run {run}",
            why="a hospital signs one when the final model arrives",
            fix="list them: flower-client certificate show",
        )
    statements = [(path, verify_statement(read_certificate(path))) for path in chosen]
    if output is OutputFormat.JSON:
        documents = [{"file": str(path), **(_document(statement) or {})} for path, statement in statements]
        typer.echo(json.dumps(documents, indent=2))
        return
    for path, statement in statements:
        _print_content(statement.content)
        typer.echo(f"  file {path}, signed by {statement.fingerprint}")
    if not statements:
        typer.echo("This hospital has certified no model yet.")


def _document(statement: "Statement | None") -> dict[str, Any] | None:
    if statement is None:
        return None
    return {"kind": statement.kind, "fingerprint": statement.fingerprint, "content": statement.content}


def _print_content(content: dict[str, Any]) -> None:
    """A few lines for people; whoever signed it chose the words, so only its shape is trusted."""
    model = content.get("model")
    name, sha256 = (model.get("name"), model.get("sha256")) if isinstance(model, dict) else (None, None)
    lines = [
        f"{content.get('hospital')} on run {content.get('run_id')}, {content.get('date')}",
        f"model {name}, sha256 {sha256}",
    ]
    if content.get("claims_privacy") is True:
        lines += [_cost_line(content, part) for part in ("training", "evaluation") if content.get(part)]
        outsider = content.get("outsider")
        if isinstance(outsider, dict) and outsider.get("epsilon") is not None:
            lines.append(f"against an outsider, as the server states it: epsilon {outsider['epsilon']}")
        unit, neighbours = content.get("unit"), content.get("neighbouring_relation")
        lines += [f"unit {unit}; {neighbours}", f"scope: {content.get('composition')}"]
        if content.get("is_complete") is not True:
            lines.append("the ledger was recovered from a backup: charges of this run may be missing")
    else:
        lines.append(str(content.get("claim")))
    for number, line in enumerate(lines):
        typer.echo(("  " if number else "") + _plain(line))


def _cost_line(content: dict[str, Any], part: str) -> str:
    cost = content[part] if isinstance(content[part], dict) else {}
    return f"{part}: epsilon {cost.get('epsilon')} at delta {cost.get('delta')}, events {cost.get('events')}"


def _plain(text: str) -> str:
    """One line without control characters: a file from elsewhere must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _state(folder: Path) -> Path:
    if not (folder / "hospital.toml").exists():
        return folder
    from client.deployment.hospital_folder import HospitalFolder

    return HospitalFolder(folder).state
