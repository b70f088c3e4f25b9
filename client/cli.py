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
flower-client export MODEL --to FILE                        the same for other programs: ONNX, torch.export
"""

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from client.approval_commands import approve
from client.certificate_commands import certificate_app
from client.deployment_commands import HERE, add_deployment_commands
from client.export_commands import export
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
app.command()(export)


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
    task: Annotated[str, typer.Option(help="--data: what labels are (docs/tasks.md)")] = "classification",
    time_column: Annotated[str, typer.Option(help="--data, visits: column of the date or days")] = "",
    series: Annotated[str, typer.Option(help="--data: none, visits or slices")] = "none",
    steps: Annotated[int, typer.Option(min=2, max=64, help="--data: longest series")] = 8,
    cache: Annotated[Path | None, typer.Option(help="--data: keep decoded images in this folder")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="a warning fails too")] = False,
    listed: Annotated[str, typer.Option("--list", help="only the files of this finding")] = "",
    show: Annotated[Path | None, typer.Option(help="write images before and after to this HTML file")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="--data: preprocessing.key=value, may be repeated")
    ] = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Check the hospital before the first round; with `--data` read images as training would, no more.

    Exit codes: 0 fine (notes and warnings included), 1 something failed (`--strict`: or is a warning), 2
    hospital.toml cannot be used. docs/data-doctor.md explains each finding about the images.
    """
    if not data:
        _check_hospital(folder, timeout_s, output, strict=strict, listed=listed, show=show)
    from client.doctor.answer import print_files, print_findings, progress
    from client.doctor.checkup import check_images
    from common.config import PublicPlan
    from common.hospital_config import DataConfig
    from common.preprocessing import Preprocessing
    from common.settings import parse, with_overrides

    contract = _contract(image_size, channels, task, series, steps)
    plan = parse(PublicPlan, with_overrides({"data": contract}, set_ or []), source="--set")
    preprocessing = Preprocessing.of(plan)
    images = DataConfig(
        path=data,
        path_column=path_column,
        path_root=path_root,
        label_column=label_column,
        patient_column=patient_column,
        split_column=split_column,
        frame_column=frame_column,
        volume_column=volume_column,
        time_column=time_column,
    )
    if show is not None:
        from client.images.contact_sheet import write_contact_sheet

        shown = write_contact_sheet(show, images, preprocessing=preprocessing, classes=None, task=task)
        _say_shown(shown, show)
    with progress() as watch:
        checkup = check_images(
            images,
            preprocessing=preprocessing,
            classes=None,
            cache_folder=cache,
            watch=watch,
            task=task,
            form=plan.data.series_form,
        )
    if listed:
        raise typer.Exit(print_files(checkup, listed, output, strict=strict))
    raise typer.Exit(print_findings(checkup, output, strict=strict))


def _contract(image_size: int, channels: int, task: str, series: str, steps: int) -> dict[str, Any]:
    """The data part of a plan as asked for by flags. Raises ConfigError."""
    from common.errors import ConfigError
    from common.series_form import form_named
    from common.task_kinds import LOSSES

    if task not in LOSSES:
        raise ConfigError(f"there is no task {task!r}", fix=f"choose {', '.join(LOSSES)}")
    form = form_named(series, steps)
    return {
        "image-size": image_size,
        "channels": 3 if channels == 3 else 1,
        "task": task,
        "series": form.kind,
        "steps": form.steps,
    }


def _say_shown(count: int, path: Path) -> None:
    from client.images.contact_sheet import WARNING

    typer.echo(f"{count} images before and after preprocessing: {path}\n{WARNING}", err=True)


def _check_hospital(
    folder: Path, timeout_s: float, output: OutputFormat, *, strict: bool, listed: str, show: Path | None
) -> NoReturn:
    from rich.console import Console

    from client.deployment.hospital_folder import HospitalFolder
    from client.provisioning.checks import check_hospital, enrolment_or_none
    from common.checks import exit_code, print_checks

    hospital = HospitalFolder(folder)
    if show is not None:
        from client.provisioning.checks_of_study import show_images

        _say_shown(show_images(hospital, show), show)
    if listed:
        from client.doctor.answer import print_files, progress
        from client.provisioning.checks_of_study import look_at_images

        with progress() as watch:
            checkup = look_at_images(hospital, enrolment_or_none(hospital), watch=watch)
        raise typer.Exit(print_files(checkup, listed, output, strict=strict))
    with Console(stderr=True).status("") as shown:
        checks = check_hospital(
            hospital, timeout_s=timeout_s, say=lambda part: shown.update(f"looking at: {part}")
        )
    print_checks(checks, output)
    raise typer.Exit(exit_code(checks, strict=strict))


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
