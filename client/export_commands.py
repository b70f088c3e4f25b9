"""`flower-client export`: a finished model as one file for other programs.

flower-client export runs/RUN --format onnx --to chest.onnx      onnxruntime, any language
flower-client export runs/RUN --format torch --to chest.pt2      torch.export.load, without our code
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from client.export.kind import ModelFormat
from common.command_line import OutputFormat


def export(
    model: Annotated[Path, typer.Argument(help="run folder, or a folder that `models` lists")],
    to: Annotated[Path, typer.Option(help="new file")],
    model_format: Annotated[ModelFormat, typer.Option("--format", help="of the file")] = ModelFormat.ONNX,
    output: Annotated[OutputFormat, typer.Option("--output", help="text or json")] = OutputFormat.TEXT,
) -> None:
    """Write a trained model for other programs, read it back and compare its answers with the model's own.

    Research use, not a medical device. Exit codes: 0 written and the same to 1e-5, 2 not exported.
    """
    from client.export.export import BATCHES, TOLERANCE, export_model

    done = export_model(model, to, kind=model_format)
    if output is OutputFormat.JSON:
        content = {
            "file": str(done.path),
            "format": done.kind.value,
            "bytes": done.bytes,
            "largest_difference": done.largest_difference,
            "tolerance": TOLERANCE,
            "metadata": dict(done.metadata),
        }
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    images = sum(BATCHES)
    typer.echo(f"{done.path}: {done.kind.value}, {done.bytes:,} bytes")
    typer.echo(
        f"Read back and asked about {images} images in batches of {', '.join(map(str, BATCHES))}: "
        f"probabilities differ by at most {done.largest_difference:.1e} (allowed {TOLERANCE:g})."
    )
    typer.echo(done.metadata["use"])
