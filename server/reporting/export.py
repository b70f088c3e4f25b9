"""Hand a trained model on: its weights, what is needed to use it, its card, and their hashes."""

from pathlib import Path

from common.errors import CheckpointError
from common.files import sha256_of_file, write_bytes_atomically
from common.parameters import parameters_sha256, read_safetensors
from server.reporting.model_card import model_card
from server.reporting.report import MODEL_CARD
from server.reporting.run_record import read_run

WEIGHTS, DESCRIPTION, SUMS = "model.safetensors", "model.json", "SHA256SUMS"


def export_model(folder: Path, out: Path) -> list[Path]:
    """Copy the model of a run to `out`, which may exist; no keys, no run history.

    Raises CheckpointError when the run has no model yet, or weights other than those of its result.
    """
    run = read_run(folder)
    for name in (WEIGHTS, DESCRIPTION):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"run {run.run_id} has no {name}",
                why=f"its status is {run.status}",
                fix="export a run that has ended with a model",
            )
    expected = run.model.get("sha256")
    if expected and parameters_sha256(read_safetensors(folder / WEIGHTS)) != expected:
        raise CheckpointError(
            f"the weights in {folder} are not those of the run's result",
            why="the SHA-256 of the parameters differs from model.sha256 in result.json",
            fix="restore model.safetensors from the run's newest checkpoint",
        )
    for name in (WEIGHTS, DESCRIPTION):
        write_bytes_atomically(out / name, (folder / name).read_bytes())
    write_bytes_atomically(out / MODEL_CARD, model_card(run).encode())
    names = (WEIGHTS, DESCRIPTION, MODEL_CARD)
    sums = "".join(f"{sha256_of_file(out / name)}  {name}\n" for name in names)
    write_bytes_atomically(out / SUMS, sums.encode())
    return [out / name for name in (*names, SUMS)]
