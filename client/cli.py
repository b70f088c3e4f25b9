"""`flower-client`: what a hospital's IT person types.

flower-client init DIR --name N --patients N --data PATH    key, hospital.toml, what to send the operator
flower-client check DIR                                     everything before the first round
flower-client plan DIR                                      what a run would cost, and other choices
flower-client start DIR                                     take part
flower-client check --data films/                           only the images: what would be trained on
flower-client ledger verify DIR                             recompute every epsilon
flower-client approve DIR                                   what waits for a person: plans and updates
flower-client purge DIR                                     remove what [retention] no longer keeps
flower-client models DIR                                    models received at the end of runs
flower-client predict MODEL IMAGE...                        what a trained model says about images
"""

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from client.approval_commands import approve
from client.certificate_commands import certificate_app
from client.deployment_commands import HERE, add_deployment_commands
from client.ledger_commands import ledger_app
from client.planning_commands import plan
from client.prediction_commands import predict
from client.retention_commands import purge
from common.command_line import Output, OutputFormat, make_app, print_table, run_app

app = make_app(
    "A hospital's side of the federation. Exit codes: 0 fine, 1 failed or something was found, "
    "2 a setting or the data cannot be used; `status` has 3: runs, the server is away."
)
add_deployment_commands(app)
app.add_typer(ledger_app, name="ledger")
app.add_typer(certificate_app, name="certificate")
app.command()(plan)
app.command()(approve)
app.command()(purge)
app.command()(predict)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="the hospital's folder, with hospital.toml")] = HERE,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="seconds to wait for the server")] = 10.0,
    data: Annotated[str, typer.Option(help="look at these images only: .npz, folder or CSV manifest")] = "",
    image_size: Annotated[int, typer.Option(min=8, max=2048, help="--data: side of the image")] = 64,
    channels: Annotated[int, typer.Option(help="--data: 1 grey, 3 colour")] = 1,
    path_column: Annotated[str, typer.Option(help="--data, CSV: column of the image file")] = "",
    path_root: Annotated[str, typer.Option(help="--data, CSV: folder the image paths start from")] = "",
    label_column: Annotated[str, typer.Option(help="--data, CSV: column of the label")] = "",
    patient_column: Annotated[str, typer.Option(help="--data, CSV: column of the patient")] = "",
    split_column: Annotated[str, typer.Option(help="--data, CSV: column of train/val/test")] = "",
    frame_column: Annotated[str, typer.Option(help="--data, CSV: column of the frame or slice")] = "",
    volume_column: Annotated[str, typer.Option(help="--data, CSV: column of a 4-D file's volume")] = "",
    task: Annotated[str, typer.Option(help="--data: multi-label or ordinal labels")] = "classification",
    cache: Annotated[Path | None, typer.Option(help="--data: keep decoded images in this folder")] = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Check the hospital before the first round; with `--data` read images as training would, no more.

    Exit codes: 0 fine (warnings included), 1 something failed, 2 hospital.toml cannot be used.
    """
    if not data:
        _check_hospital(folder, timeout_s, output)
    from client.images.doctor import check_images
    from common.hospital_config import DataConfig
    from common.preprocessing import Preprocessing

    checkup = check_images(
        DataConfig(
            path=data,
            path_column=path_column,
            path_root=path_root,
            label_column=label_column,
            patient_column=patient_column,
            split_column=split_column,
            frame_column=frame_column,
            volume_column=volume_column,
        ),
        preprocessing=Preprocessing(image_size=image_size, channels=3 if channels == 3 else 1),
        classes=None,
        cache_folder=cache,
        task=_known_task(task),
    )
    if output is OutputFormat.JSON:
        rows = [{"check": c, "result": r, "what_to_do": w} for c, r, w in checkup.rows()]
        typer.echo(json.dumps({"usable": checkup.is_usable, "checks": rows}, indent=2, ensure_ascii=False))
    else:
        print_table(("check", "result", "what to do"), checkup.rows())
    raise typer.Exit(0 if checkup.is_usable else 1)


def _known_task(name: str) -> str:
    from common.errors import ConfigError
    from common.task_kinds import LOSSES

    if name not in LOSSES:
        raise ConfigError(f"there is no task {name!r}", fix=f"choose {', '.join(LOSSES)}")
    return name


def _check_hospital(folder: Path, timeout_s: float, output: OutputFormat) -> NoReturn:
    from rich.console import Console

    from client.deployment.hospital_folder import HospitalFolder
    from client.provisioning.checks import check_hospital
    from common.checks import exit_code, print_checks

    hospital = HospitalFolder(folder)
    with Console(stderr=True).status("") as shown:
        checks = check_hospital(
            hospital, timeout_s=timeout_s, say=lambda part: shown.update(f"looking at: {part}")
        )
    print_checks(checks, output)
    raise typer.Exit(exit_code(checks))


@app.command()
def models(
    folder: Annotated[Path, typer.Argument(help="the hospital's folder, or its state folder")] = HERE,
    output: Output = OutputFormat.TEXT,
) -> None:
    """List the models that this hospital received, and whether their files are as they came."""
    from client.received_models import received_models

    state = _state_folder(folder)
    found = received_models(state / "models")
    if output is OutputFormat.JSON:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        rows = [(str(m["run_id"]), str(m["model"]), str(m["sha256"])[:16], str(m["state"])) for m in found]
        print_table(("run", "model", "sha256", "files"), rows)


def _state_folder(folder: Path) -> Path:
    if not (folder / "hospital.toml").exists():
        return folder
    from client.deployment.hospital_folder import HospitalFolder

    return HospitalFolder(folder).state


def main() -> None:
    """Entry point of `flower-client`."""
    run_app(app)


if __name__ == "__main__":
    main()
