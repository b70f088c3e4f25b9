"""`flower-client init|start|status|pause|leave|renew-key|code`: a hospital in operation.

Every command takes the hospital's folder, by default the current one.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from common.command_line import Output, OutputFormat, print_table

Folder = Annotated[Path, typer.Argument(help="the hospital's folder, with hospital.toml", show_default=True)]
HERE = Path()

code_app = typer.Typer(
    help="The bundles that this hospital accepts: its own list of digests.", no_args_is_help=True
)
CodeFolder = Annotated[Path, typer.Option("--dir", help="the hospital's folder, with hospital.toml")]


def add_deployment_commands(app: typer.Typer) -> None:
    """Put them on `flower-client`."""
    app.command()(init)
    app.command()(start)
    app.command()(status)
    app.command()(pause)
    app.command()(leave)
    app.command(name="renew-key")(renew_key)
    app.add_typer(code_app, name="code")


def init(
    folder: Annotated[Path, typer.Argument(help="new folder of the hospital", metavar="DIR")],
    name: Annotated[str, typer.Option(help="the hospital's name on the roster: letters, digits, . - _")],
    patients: Annotated[int, typer.Option(min=1, help="enrolled patients: one public, rounded number")],
    data: Annotated[Path, typer.Option(help="a .npz, an image folder or a CSV manifest")],
    classes: Annotated[str, typer.Option(help="the only classes a run may use: normal,opacity")] = "",
    path_column: Annotated[str, typer.Option(help="CSV: column of the image file")] = "",
    path_root: Annotated[str, typer.Option(help="CSV: folder the image paths start from")] = "",
    label_column: Annotated[str, typer.Option(help="CSV: column of the label")] = "",
    patient_column: Annotated[str, typer.Option(help="CSV: column of the patient")] = "",
    split_column: Annotated[str, typer.Option(help="CSV: column of train/val/test")] = "",
    frame_column: Annotated[str, typer.Option(help="CSV: column of the frame or slice")] = "",
    volume_column: Annotated[str, typer.Option(help="CSV: column of a 4-D file's volume")] = "",
    epsilon: Annotated[float, typer.Option(help="privacy budget of the worst-off patient, for ever")] = 8.0,
    ledger: Annotated[str, typer.Option(help="folder of the site-wide ledger; empty: the user's own")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N")] = "auto",
    threads: Annotated[int, typer.Option(help="threads of the arithmetic; 0 all cores")] = 0,
    https_proxy: Annotated[str, typer.Option(help="http://host:port of the way out")] = "",
    runtime_port: Annotated[int, typer.Option(help="loopback port of Flower's SuperNode")] = 9094,
    health_port: Annotated[int, typer.Option(help="loopback port of gRPC health")] = 9095,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Make a hospital's folder: its key, hospital.toml with comments, its list of accepted code."""
    from client.provisioning.new_hospital import make_hospital
    from common.hospital_config import HospitalConfig
    from common.settings import parse

    values: dict[str, Any] = {
        "hospital": {"name": name, "enrolled-patients": patients},
        "data": {
            "path": str(data.absolute()),
            "path-column": path_column,
            "path-root": str(Path(path_root).absolute()) if path_root else "",
            "label-column": label_column,
            "patient-column": patient_column,
            "split-column": split_column,
            "frame-column": frame_column,
            "volume-column": volume_column,
            "classes": [part.strip() for part in classes.split(",") if part.strip()],
        },
        "policy": {"epsilon": epsilon},
        "site": {
            "device": device,
            "threads": threads,
            "ledger": str(Path(ledger).absolute()) if ledger else "",
        },
        "connection": {
            "https-proxy": https_proxy,
            "runtime-port": runtime_port,
            "health-port": health_port,
        },
    }
    made = make_hospital(folder, parse(HospitalConfig, values, source="flower-client init"))
    command = made.enroll_command()
    if output is OutputFormat.JSON:
        _print_json(
            {
                "name": made.name,
                "fingerprint": made.fingerprint,
                "public_key": str(made.public_key),
                "config": str(made.config_file),
                "enroll_command": command,
            }
        )
        return
    if not data.exists():
        typer.echo(f"Note: {data} does not exist on this machine (yet).", err=True)
    typer.echo(f"Made {made.config_file}; look through its comments, above all [policy].")
    typer.echo(f"Key fingerprint: {made.fingerprint}")
    typer.echo(f"1. Send {made.public_key} to the operator, and the fingerprint by telephone. They type:")
    typer.echo(f"     {command}")
    typer.echo(f"2. Put the enrolment.toml that comes back into {folder}")
    typer.echo(f"3. flower-client check {folder}")
    typer.echo(f"4. flower-client start {folder}")
    typer.echo(f"The private key beside it ({made.public_key.stem}) never leaves this machine.")


def start(folder: Folder = HERE) -> None:
    """Take part: connect, wait for rounds, train. Exit codes: 0 ended on request, 1 failed, 2 settings."""
    from client.deployment.supervisor import start as start_hospital

    raise typer.Exit(int(start_hospital(folder)))


def status(folder: Folder = HERE, output: Output = OutputFormat.TEXT) -> None:
    """Say how this hospital's client is.

    Exit codes: 0 runs and is connected, 1 does not run (or its worker is not ready), 2 settings, 3 runs and
    waits for the server: nothing is to be done unless `last error` says so.
    """
    from client.provisioning.status import hospital_status

    found = hospital_status(folder)
    if output is OutputFormat.JSON:
        _print_json(found.as_json())
    else:
        print_table(("what", "state"), found.rows())
    raise typer.Exit(found.exit_code)


def pause(
    folder: Folder = HERE, off: Annotated[bool, typer.Option("--off", help="take part again")] = False
) -> None:
    """Refuse rounds from the next one on, and stay connected; `--off` takes part again."""
    from client.provisioning import standing

    name, state = _named(folder)
    if off:
        changed = standing.unpause(state)
        typer.echo(f"{name} takes part again." if changed else f"{name} was not paused.")
        return
    changed = standing.pause(state)
    typer.echo(f"{name} pauses from the next round on." if changed else f"{name} was paused already.")
    typer.echo("A round that is being trained is finished. Again: flower-client pause --off")


def leave(
    folder: Folder = HERE, off: Annotated[bool, typer.Option("--off", help="come back after all")] = False
) -> None:
    """Leave the federation: a running client ends, rounds are refused; ledger and models stay here."""
    from client.provisioning import standing

    name, state = _named(folder)
    if off:
        back = standing.come_back(state)
        typer.echo(f"{name} takes part again: flower-client start" if back else f"{name} had not left.")
        return
    left = standing.leave(state)
    typer.echo(f"{name} leaves the federation." if left else f"{name} had left already.")
    typer.echo(f"Tell the operator, who types: flower-server revoke {name}")
    typer.echo("What was trained stays in the models that exist, and in this hospital's ledger.")


def renew_key(folder: Folder = HERE) -> None:
    """Make a new key (also for a lost one); the old one is kept beside it until you delete it."""
    from client.provisioning.new_hospital import renew_key as renew

    made, old = renew(folder)
    typer.echo(f"New key fingerprint: {made.fingerprint}")
    typer.echo(f"The old key is {old}." if old else "There was no old key.")
    typer.echo(f"Send {made.public_key} to the operator, and the fingerprint by telephone. They type:")
    typer.echo(f"     {made.enroll_command(replace_key=True)}")
    typer.echo("Put the enrolment.toml that comes back here, then restart flower-client.")
    typer.echo("Until then a running client stays connected and a new one cannot connect.")


@code_app.command(name="list")
def list_code(folder: CodeFolder = HERE, output: Output = OutputFormat.TEXT) -> None:
    """List the accepted bundles; anything else is refused before it is looked at."""
    from client.provisioning.code_list import accepted
    from common.bundle.bundle import bundle_sha256

    _, state = _named(folder)
    own = bundle_sha256()
    rows = [
        {"sha256": c.sha256, "accepted_at": c.accepted_at, "note": c.note, "installed": c.sha256 == own}
        for c in accepted(state)
    ]
    if output is OutputFormat.JSON:
        _print_json(rows)
        return
    for row in rows:  # no table: a digest is compared whole
        installed = ", installed here" if row["installed"] else ""
        typer.echo(f"{row['sha256']}\n  accepted {row['accepted_at']}{installed}. {row['note']}")
    if not rows:
        typer.echo("Nothing is accepted: no run can train here.")


@code_app.command(name="accept")
def accept_code(
    digest: Annotated[str, typer.Argument(help="SHA-256 of the bundle, as the operator told it")],
    folder: CodeFolder = HERE,
    note: Annotated[str, typer.Option(help="why, for the list")] = "",
) -> None:
    """Put a bundle's digest on this hospital's list."""
    from client.provisioning.code_list import accept

    _, state = _named(folder)
    is_new = accept(state, digest, note=note)
    typer.echo("Accepted." if is_new else "It was on the list already.")


@code_app.command(name="withdraw")
def withdraw_code(
    digest: Annotated[str, typer.Argument(help="SHA-256 of the bundle, or its first digits")],
    folder: CodeFolder = HERE,
) -> None:
    """Take a bundle's digest off the list; its runs are refused from the next round on."""
    from client.provisioning.code_list import withdraw

    _, state = _named(folder)
    withdraw(state, digest)
    typer.echo("Withdrawn.")


def _named(folder: Path) -> tuple[str, Path]:
    """The hospital's name and state folder."""
    from client.deployment.hospital_folder import HospitalFolder

    hospital = HospitalFolder(folder)
    return hospital.config.hospital.name, hospital.state


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
