"""`flower-client`: what a hospital's IT person types.

flower-client check --data films/        what would be trained on, and what would not
flower-client ledger verify FOLDER       recompute every epsilon
flower-client models STATE               models received at the end of runs
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from client.ledger_commands import ledger_app
from common.command_line import Output, OutputFormat, make_app, print_table, run_app

app = make_app(
    "A hospital's side of the federation. Exit codes: 0 fine, 1 failed or something was found, "
    "2 a setting or the data cannot be used."
)
app.add_typer(ledger_app, name="ledger")


@app.command()
def check(
    data: Annotated[str, typer.Option(help="a .npz, an image folder or a CSV manifest")],
    image_size: Annotated[int, typer.Option(min=8, max=2048, help="side of the image for the model")] = 64,
    channels: Annotated[int, typer.Option(help="1 grey, 3 colour")] = 1,
    path_column: Annotated[str, typer.Option(help="CSV: column of the image file")] = "",
    path_root: Annotated[str, typer.Option(help="CSV: folder the image paths start from")] = "",
    label_column: Annotated[str, typer.Option(help="CSV: column of the label")] = "",
    patient_column: Annotated[str, typer.Option(help="CSV: column of the patient")] = "",
    split_column: Annotated[str, typer.Option(help="CSV: column of train/val/test")] = "",
    cache: Annotated[Path | None, typer.Option(help="keep decoded images in this folder")] = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Read the images as training would and say what was found; nothing leaves this machine."""
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
        ),
        preprocessing=Preprocessing(image_size=image_size, channels=3 if channels == 3 else 1),
        classes=None,
        cache_folder=cache,
    )
    if output is OutputFormat.JSON:
        rows = [{"check": c, "result": r, "what_to_do": w} for c, r, w in checkup.rows()]
        typer.echo(json.dumps({"usable": checkup.is_usable, "checks": rows}, indent=2, ensure_ascii=False))
    else:
        print_table(("check", "result", "what to do"), checkup.rows())
    raise typer.Exit(0 if checkup.is_usable else 1)


@app.command()
def models(
    state: Annotated[Path, typer.Argument(help="the hospital's state folder")],
    output: Output = OutputFormat.TEXT,
) -> None:
    """List the models that this hospital received, and whether their files are as they came."""
    from client.received_models import received_models

    found = received_models(state / "models")
    if output is OutputFormat.JSON:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        rows = [(str(m["run_id"]), str(m["model"]), str(m["sha256"])[:16], str(m["state"])) for m in found]
        print_table(("run", "model", "sha256", "files"), rows)


def main() -> None:
    """Entry point of `flower-client`."""
    run_app(app)
