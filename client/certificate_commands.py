"""`flower-client certificate verify|show`: check a release certificate offline, and list one's own.

Exit codes of verify: 0 everything is right and signed by the key that was named, 1 something is not, 2 a file
cannot be used, 3 nothing is wrong, but WHO signed was not checked: no key was named to compare with.
"""

import json
import math
from collections.abc import Iterator
from decimal import ROUND_CEILING, Context, Decimal
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
    from client.certificate_check import check_certificate, is_right, read_certificate
    from common.node_keys import load_public_key

    if key is not None and fingerprint:
        raise ConfigError("--key and --fingerprint say the same", fix="give one of them")
    wanted = load_public_key(key).fingerprint if key is not None else fingerprint or None
    statement, parts = check_certificate(read_certificate(file), fingerprint=wanted, model=model)
    ok = is_right(parts)
    if output is OutputFormat.JSON:
        checks = [{"part": part.part, "ok": part.ok, "result": part.result} for part in parts]
        typer.echo(json.dumps({"ok": ok, "checks": checks, "certificate": _document(statement)}, indent=2))
    else:
        if statement is not None:
            _print_content(statement.content)
        words = {True: "ok", False: "WRONG", None: "not checked"}
        print_table(("part", "", "result"), [(p.part, words[p.ok], p.result) for p in parts])
        typer.echo(_verdict(ok, statement.content if statement is not None else {}))
    raise typer.Exit({True: 0, False: 1, None: 3}[ok])


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


def _verdict(ok: bool | None, content: dict[str, Any]) -> str:
    if ok is False:
        return "The certificate does NOT hold."
    said = "Signature and arithmetic fit."
    if ok is None:
        said += " WHO signed was not checked: anybody can sign such a file with a key of their own."
    elif content.get("is_complete") is True:
        return "The certificate holds."
    if content.get("is_complete") is not True:
        said += " It holds for what it lists; the hospital's ledger was recovered in this run or before it."
    return said


def _document(statement: "Statement | None") -> dict[str, Any] | None:
    if statement is None:
        return None
    return {"kind": statement.kind, "fingerprint": statement.fingerprint, "content": statement.content}


def _print_content(content: dict[str, Any]) -> None:
    """A few lines for people; whoever signed it chose the words, so only its shape is trusted."""
    model = content.get("model")
    name, sha256 = (model.get("name"), model.get("sha256")) if isinstance(model, dict) else (None, None)
    events: list[tuple[str, ...]] = []
    lines = [
        f"{content.get('hospital')} on run {content.get('run_id')}, {content.get('date')}",
        f"model {name}, sha256 {sha256}",
    ]
    if content.get("claims_privacy") is True:
        lines += [_cost_line(content, part) for part in ("training", "evaluation") if content.get(part)]
        events = [row for part in ("training", "evaluation") for row in _event_rows(content.get(part), part)]
        outsider = content.get("outsider")
        if isinstance(outsider, dict) and outsider.get("epsilon") is not None:
            lines.append(f"against an outsider, as the server states it: epsilon {_up(outsider['epsilon'])}")
        unit, neighbours = content.get("unit"), content.get("neighbouring_relation")
        lines += [f"unit {unit}; {neighbours}", f"scope: {content.get('composition')}"]
        if content.get("is_complete") is not True:
            lines.append("the ledger was recovered from a backup: events of this run may be missing")
    else:
        lines.append(str(content.get("claim")))
    for number, line in enumerate(lines):
        typer.echo(("  " if number else "") + _plain(line))
    if events:
        print_table(("events", "sampling rate", "noise multiplier", "clip", "steps"), events)


def _cost_line(content: dict[str, Any], part: str) -> str:
    cost = content[part] if isinstance(content[part], dict) else {}
    stated = cost.get("epsilon")
    epsilon = "no epsilon is stated" if stated is None else f"epsilon {_up(stated)}"
    return f"{part}: {epsilon} at delta {_short(cost.get('delta'))}, {cost.get('mechanism')}"


def _event_rows(cost: object, part: str) -> Iterator[tuple[str, ...]]:
    events = cost.get("events") if isinstance(cost, dict) else None
    names = ("sampling_rate", "noise_multiplier", "l2_clip_norm", "steps")
    for event in events if isinstance(events, list) else []:
        if isinstance(event, dict):
            yield (part, *("" if event.get(name) is None else _short(event[name]) for name in names))


def _short(value: object) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.6g}" if is_number else _plain(str(value)[:40])


def _up(value: object) -> str:
    """Four digits, rounded up: a bound that is printed is still one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return _plain(str(value)[:40])
    return f"{Decimal(value).normalize(Context(prec=4, rounding=ROUND_CEILING)):f}"


def _plain(text: str) -> str:
    """One line without control characters: a file from elsewhere must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _state(folder: Path) -> Path:
    if not (folder / "hospital.toml").exists():
        return folder
    from client.deployment.hospital_folder import HospitalFolder

    return HospitalFolder(folder).state
