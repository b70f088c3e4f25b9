"""`flower-client ledger show|verify|export|recover`: what was spent, whether it is true, what to do if not.

Exit codes: 0 right, 1 findings of verify, receipts that contradict what show prints, or a recovery that waits
for --yes, 2 it cannot be done at all; export signs nothing that receipts contradict.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from common.errors import ConfigError, FederationError, printable

if TYPE_CHECKING:
    from client.deployment.hospital_folder import HospitalFolder
    from client.ledger.ledger import Ledger

ledger_app = typer.Typer(help="What was spent, and whether the ledger is right.", no_args_is_help=True)

Where = Annotated[
    Path, typer.Argument(help="hospital.toml, its folder, or the ledger's own folder.", show_default=True)
]
Format = Annotated[Literal["text", "json"], typer.Option("--format", help="text or json.")]
Delta = Annotated[float | None, typer.Option(help="Delta of the statement; by default the hospital's.")]


@ledger_app.command()
def show(where: Where = Path("hospital.toml"), delta: Delta = None, output: Format = "text") -> None:
    """Tell what the worst-off patient has spent, over all runs and per run."""
    from client.ledger.contradiction import contradiction, require_not_gone

    try:
        folder, own_delta = _locate(where)
        if (hospital := _hospital(where)) is not None:
            require_not_gone(folder, hospital.state)
        ledger = _open(folder)
        spent = ledger.spent(delta or own_delta or _last_delta(ledger))
        wrong = contradiction(ledger, hospital.state) if hospital is not None else None
    except FederationError as error:
        _unusable(error, output)
    if output == "json":
        said = {**asdict(spent), "private": spent.private, "problem": str(wrong) if wrong else None}
        typer.echo(json.dumps(said, indent=2))
        raise typer.Exit(1 if wrong else 0)
    if wrong:
        typer.echo(f"These numbers are TOO LOW or of another ledger: {wrong}", err=True)
    typer.echo(spent.in_words())
    for run in spent.runs:
        cost = f"epsilon {run.epsilon:.4g}" if run.epsilon is not None else "NO PRIVACY CLAIMED"
        noise = f", noise multiplier {run.noise_multiplier:g}" if run.noise_multiplier else ""
        looks = f", {run.evaluations} evaluation(s)" if run.evaluations else ""
        typer.echo(f"  {run.run_id}: {cost}, {run.rounds} round(s), {run.steps} step(s){noise}{looks}")
    if wrong:
        raise typer.Exit(1)


@ledger_app.command()
def verify(where: Where = Path("hospital.toml"), output: Format = "text") -> None:
    """Recompute every stored epsilon and hash, check the receipts at hand; or verify an exported statement.

    Exit 0 if right, 1 with findings, 2 if unusable. A file that is no .toml is taken for a statement.
    """
    from client.ledger.contradiction import require_not_gone
    from client.ledger.ledger import Ledger
    from client.ledger.receipts import receipt_findings

    try:
        if where.is_file() and where.suffix != ".toml":
            _verify_statement(where, output)
            return
        folder, _ = _locate(where)
        hospital = _hospital(where)
        if hospital is not None:
            require_not_gone(folder, hospital.state)
        ledger = Ledger.examine(folder)
        findings = ledger.verify()
        if not findings and hospital is not None:
            findings = receipt_findings(hospital.state, ledger)
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
        typer.echo(
            f"{len(findings)} finding(s): do not train with this ledger; restore its newest backup, or see "
            "what `flower-client ledger recover` can do from receipts."
        )
    else:
        typer.echo(f"The ledger is right: {number} charge(s), chain intact, every epsilon recomputed.")
    if findings:
        raise typer.Exit(1)


@ledger_app.command()
def export(
    where: Where = Path("hospital.toml"),
    out: Annotated[Path | None, typer.Option(help="file to write; without it to the screen.")] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="without a signature, and saying so.")] = False,
) -> None:
    """Write a statement of what was spent, signed with the hospital's key; it names and counts no patient."""
    from client.ledger.contradiction import require_borne_out, require_not_gone
    from client.ledger.statement import ledger_content, signed_content
    from common.files import write_bytes_atomically
    from common.node_keys import load_private_key

    try:
        hospital = _required_hospital(where)
        place = hospital.config.ledger_folder(hospital.path)
        require_not_gone(place, hospital.state)
        ledger = _open(place)
        require_borne_out(ledger, hospital.state)  # too low a number is never signed
        if not unsigned and not hospital.key_file.is_file():
            raise ConfigError(
                f"there is no key {hospital.key_file} to sign with",
                fix="restore it from your backup, name it in connection.key, or ask for --unsigned",
            )
        key = None if unsigned else load_private_key(hospital.key_file)
        text = signed_content(ledger_content(ledger, hospital.config), key)
    except FederationError as error:
        _unusable(error, "text")
    if out is None:
        typer.echo(text)
        return
    write_bytes_atomically(out, f"{text}\n".encode())
    typer.echo(f"{out}: {'NOT signed' if unsigned else 'signed'}; verify it with flower-client ledger verify")


@ledger_app.command()
def recover(
    where: Annotated[Path, typer.Argument(help="hospital.toml or its folder.")] = Path("hospital.toml"),
    receipt: Annotated[
        list[Path] | None, typer.Option(help="the newest receipt from an operator; may be given again.")
    ] = None,
    whole_budget: Annotated[
        bool,
        typer.Option("--whole-budget", help="charge all that the policy allows; nothing private fits then."),
    ] = False,
    start_anew: Annotated[
        bool,
        typer.Option(
            "--start-anew", help="charge nothing: another ledger never had the patients of this one."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do it.")] = False,
) -> None:
    """Go on from an older or lost ledger: charge what the newest receipts prove to every patient.

    Without --yes it only shows what is there and what would be charged.
    """
    from client.ledger.recovery import carry_out, plan_recovery

    try:
        hospital = _required_hospital(where)
        if start_anew:
            if receipt or whole_budget:
                raise ConfigError("--start-anew charges nothing", fix="leave the other options out")
            _start_anew(hospital, yes=yes)
            return
        further = [_bytes_of(path) for path in receipt or []]
        plan = plan_recovery(hospital, further=further, whole_budget=whole_budget)
        typer.echo(plan.in_words())
        if not plan.is_needed:
            typer.echo(
                "Nothing is missing as far as these receipts tell. If you know better, ask the operator for "
                "the newest one (--receipt FILE), or charge everything (--whole-budget)."
            )
            return
        if not yes:
            typer.echo("Nothing was changed. Charges are for ever; say --yes to make these.")
            raise typer.Exit(1)
        ledger = carry_out(plan, hospital)
        typer.echo(ledger.spent(hospital.config.delta).in_words())
    except FederationError as error:
        _unusable(error, "text")


def _start_anew(hospital: "HospitalFolder", *, yes: bool) -> None:
    from client.ledger.starting_anew import is_in_use, start_anew

    if is_in_use(hospital):
        typer.echo("This ledger is in use already: nothing to do.")
        return
    typer.echo(
        "Nothing is charged, and what another ledger of this hospital has spent counts for nobody here.\n"
        "That is right only if no patient of this hospital's data was ever in another ledger,\n"
        "or if this one holds all that was charged to them."
    )
    if not yes:
        typer.echo("Nothing was changed. If that is so, say --yes.")
        raise typer.Exit(1)
    ledger = start_anew(hospital)
    typer.echo(f"This ledger is in use from now on: {len(ledger.charges())} charge(s).")


def _verify_statement(file: Path, output: str) -> None:
    """Say who signed an exported statement and what it states; ConfigError where it is not right."""
    from client.ledger.statement import read_statement

    signer, content = read_statement(_bytes_of(file).decode(errors="replace"))
    if output == "json":
        typer.echo(json.dumps({"ok": True, "signer": signer, "content": content}, indent=2))
        return
    epsilon, shown = content.get("epsilon"), {name: printable(content.get(name)) for name in content}
    typer.echo(f"The signature is right. Signed by {signer}: compare that with the roster.")
    typer.echo(
        f"{shown.get('hospital')} states, as of {shown.get('date')}: epsilon "
        f"{'without bound' if epsilon is None else printable(epsilon)} at delta {shown.get('delta')}, "
        f"composed over {shown.get('composition')}; {shown.get('charges')} charge(s)."
    )
    if content.get("all_training_private") is not True:
        typer.echo("It also trained without a privacy claim: for those patients nothing is guaranteed.")


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read", why=error.strerror or str(error)) from None


def _hospital(where: Path) -> "HospitalFolder | None":
    """The hospital's folder, where `where` names it or its hospital.toml."""
    from client.deployment.hospital_folder import HospitalFolder

    file = where / "hospital.toml" if where.is_dir() else where
    return HospitalFolder(file.parent) if file.name == "hospital.toml" and file.is_file() else None


def _required_hospital(where: Path) -> "HospitalFolder":
    hospital = _hospital(where)
    if hospital is None:
        raise ConfigError(
            f"there is no hospital.toml at {where}",
            why="it says which key signs, what the budget is, and where the receipts are",
            fix="name hospital.toml or its folder",
        )
    return hospital


def _open(folder: Path) -> "Ledger":
    from client.ledger.ledger import Ledger

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
