"""`flower-server`, the commands of a real federation: set it up, check it, start it, keep it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from common.command_line import Output, OutputFormat, plain_table, show

Folder = Annotated[
    Path, typer.Argument(metavar="[DIR]", help="Folder of the federation.", show_default=False)
]
Dir = Annotated[Path, typer.Option("--dir", help="Folder of the federation.", show_default="here")]
HERE = Path()


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the federation.")],
    name: Annotated[str, typer.Option(help="Name of the study: letters, digits, dot, dash, underscore.")],
    address: Annotated[str, typer.Option(help="host:port under which hospitals reach this server.")],
    listen: Annotated[str, typer.Option(help="host:port of this machine to listen on.")] = "0.0.0.0:8443",
    classes: Annotated[str, typer.Option(help="Class names in label order: normal,pneumonia")] = "",
    image_size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for colour.")] = None,
    model: Annotated[str, typer.Option(help="Name from the model registry.")] = "",
    rounds: Annotated[int | None, typer.Option(help="Rounds of training.")] = None,
    quorum: Annotated[int | None, typer.Option(help="Updates that a round needs to count.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other setting.")
    ] = None,
) -> None:
    """Make a federation: authority, server certificate, secret, roster, federation.toml with comments."""
    from server.provisioning.new_federation import make_federation, plan_federation

    chosen: dict[str, dict[str, object]] = {
        "federation": {"name": name, "rounds": rounds},
        "network": {"address": address, "listen": listen},
        "data": {
            "classes": [part.strip() for part in classes.split(",")] if classes else None,
            "image-size": image_size,
            "channels": channels,
        },
        "model": {"name": model or None},
        "server": {"quorum": quorum},
    }
    asked = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in chosen.items()
    }
    folder = make_federation(directory, plan_federation(asked, settings or ()))
    names = ", ".join(folder.config().network.certificate_names)
    typer.echo(
        f"federation {name} in {directory}: authority (10 years), server certificate (1 year) for {names}"
    )
    typer.echo(f"plan and network: {folder.federation_toml} (read it through before you enrol hospitals)")
    typer.echo("next: flower-server enroll NAME KEY.pub --patients N --dir " + str(directory))


def enroll(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the hospital on the roster.")],
    key: Annotated[Path, typer.Argument(metavar="KEY.pub", help="Its public key, from flower-client init.")],
    patients: Annotated[int, typer.Option(min=1, max=10**9, help="Its rounded, public count of patients.")],
    directory: Dir = HERE,
    replace_key: Annotated[
        bool, typer.Option("--replace-key", help="The old key is lost or stolen: never take it again.")
    ] = False,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Put a hospital on the roster and write the file that it needs; again to change its count or key."""
    from common.node_keys import load_public_key
    from server.provisioning.enrolments import enrol_hospital
    from server.provisioning.operator_config import OperatorFolder
    from server.provisioning.roster import Change

    entry, change, path = enrol_hospital(
        OperatorFolder(directory),
        name=name,
        key=load_public_key(key),
        enrolled_patients=patients,
        replace_key=replace_key,
    )
    if output is OutputFormat.JSON:
        content = {"change": change.value, "enrolment": str(path), **entry.model_dump(mode="json")}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    typer.echo(f"{entry.name}: {change.value}, {entry.enrolled_patients} patients, key {entry.fingerprint}")
    if change is Change.COUNT:
        typer.echo("the new count applies from the next run; the open one keeps the count that it began with")
    typer.echo("compare the fingerprint with the hospital by telephone, not by e-mail")
    typer.echo(f"send the hospital {path} (no secret in it); it becomes enrolment.toml beside hospital.toml")
    if patients % 10 and patients > 20:
        typer.echo(f"note: {patients} is not rounded; this number is public, so round it", err=True)


def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name on the roster.")], directory: Dir = HERE
) -> None:
    """Take a hospital off the roster: a running server stops asking it; its key is never taken again."""
    from server.provisioning.enrolments import revoke_hospital
    from server.provisioning.operator_config import OperatorFolder

    folder = OperatorFolder(directory)
    folder.config()
    entry = revoke_hospital(folder, name)
    typer.echo(f"{entry.name} is revoked; its key {entry.fingerprint} is never taken again")
    typer.echo(
        "to let it in again: a new key (flower-client renew-key), then flower-server enroll --replace-key"
    )


def roster(directory: Dir = HERE, output: Output = OutputFormat.TEXT) -> None:
    """List the hospitals on the roster."""
    from server.provisioning.operator_config import OperatorFolder
    from server.provisioning.roster import read_roster

    folder = OperatorFolder(directory)
    folder.config()
    entries = read_roster(folder.roster)
    if output is OutputFormat.JSON:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=2))
    elif not entries:
        typer.echo("no hospital yet: flower-server enroll NAME KEY.pub --patients N")
    else:
        rows = [
            (
                e.name,
                str(e.enrolled_patients),
                f"revoked {e.revoked_at}" if e.revoked_at else "active",
                e.fingerprint,
            )
            for e in entries
        ]
        show(plain_table(("hospital", "patients", "state", "key"), rows))


def renew(
    directory: Folder = HERE,
    authority: Annotated[
        bool, typer.Option("--authority", help="Also a new authority: every hospital needs its new file.")
    ] = False,
) -> None:
    """Make a new server certificate (1 year) for the names in federation.toml; hospitals need nothing new."""
    from server.provisioning.certificates import days_left, names_of
    from server.provisioning.enrolments import renew_authority
    from server.provisioning.new_federation import renew_server_certificate
    from server.provisioning.operator_config import OperatorFolder

    folder = OperatorFolder(directory)
    files = renew_authority(folder) if authority else []
    if not authority:
        renew_server_certificate(folder)
    held = ", ".join(names_of(folder.server_certificate))
    typer.echo(f"new server certificate for {held}; {days_left(folder.server_certificate):.0f} days left")
    typer.echo("a running server uses it after its next start (a run goes on by itself)")
    for file in files:
        typer.echo(f"send {file} to its hospital: until then it refuses this server")


def check(directory: Folder = HERE, output: Output = OutputFormat.TEXT) -> None:
    """Check clock, certificates, secrets, roster, ports, machine, versions, database; exit 1: one failed."""
    from common.checks import exit_code, print_checks
    from server.provisioning.checks import check_operator
    from server.provisioning.operator_config import OperatorFolder

    checks = check_operator(OperatorFolder(directory))
    print_checks(checks, output)
    raise typer.Exit(exit_code(checks))


def start(
    directory: Folder = HERE,
    new: Annotated[
        bool, typer.Option("--new", help="Begin a new run, also when the last one can go on.")
    ] = False,
) -> None:
    """Start the server: an interrupted run goes on, else a new one begins. Ctrl-C stops the run."""
    from server.deployment.supervisor import start as start_server
    from server.provisioning.operator_config import OperatorFolder

    folder = OperatorFolder(directory)
    folder.config()
    raise typer.Exit(int(start_server(folder, new=new)))


def resume(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Folder or id; else the current run.")
    ] = None,
    directory: Dir = HERE,
) -> None:
    """Start the server and go on with a run that was stopped, lost its quorum or failed."""
    from server.deployment.supervisor import start as start_server
    from server.provisioning.operator_config import OperatorFolder
    from server.provisioning.run_lookup import choose_run, find_run

    folder = OperatorFolder(directory)
    folder.config()
    if run is None:
        find_run(None, directory=folder.path, runs=None)
    chosen = None if run is None else choose_run(folder, run)
    raise typer.Exit(int(start_server(folder, resume=True, run=chosen)))


def backup(
    directory: Folder = HERE,
    *,
    out: Annotated[Path, typer.Option(help="New file, NAME.tar.gz; it holds private keys.")],
) -> None:
    """Write settings, keys, roster, database and runs into one file, also while the server runs."""
    from server.provisioning.backup import write_backup
    from server.provisioning.operator_config import OperatorFolder

    number = write_backup(OperatorFolder(directory), out)
    typer.echo(f"{out}: {number} files, {out.stat().st_size / 1e6:.1f} MB, mode 0600; it holds private keys")


def restore(
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="A file of flower-server backup.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
) -> None:
    """Unpack a backup into a new folder."""
    from server.provisioning.backup import restore_backup

    folder = restore_backup(archive, directory)
    typer.echo(
        f"{folder.config().federation.name} is back in {directory}; next: flower-server check {directory}"
    )
    typer.echo(
        "what hospitals have charged since stays charged; if they answer that a round is answered already, "
        "write 2 into the file attempt of the run's folder to have it trained anew"
    )


def add_deployment_commands(app: typer.Typer) -> None:
    """Put these commands into `flower-server`."""
    for command in (init, enroll, revoke, roster, check, start, resume, renew, backup, restore):
        app.command()(command)
