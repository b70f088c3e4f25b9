"""`flower-simulate`: many hospitals on one machine. Heavy imports wait until a command needs them.

From the command line: `flower-simulate --help`.
"""

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.command_line import Output, OutputFormat, make_app, run_app
from simulations.audit_commands import mount as mount_audit
from simulations.bench_commands import mount as mount_bench
from simulations.compare_commands import mount as mount_compare
from simulations.ensemble_commands import mount as mount_ensemble
from simulations.flags import takes_scenario
from simulations.scenario import Scenario

if TYPE_CHECKING:
    from simulations.run import Outcome

HELP = """Train with simulated hospitals on this machine.

flower-simulate run                      five hospitals of generated chest films\n
flower-simulate run --data images.npz    your own images

Exit codes: 0 completed, 1 failed, 2 bad configuration or data, 3 stopped, 4 quorum lost, 5 budget exhausted.
"""

app = make_app(HELP)


class Layout(StrEnum):
    """Layouts of generated data."""

    NPZ = "npz"
    FOLDERS = "folders"
    CSV = "csv"


Quiet = Annotated[bool, typer.Option("--quiet", help="No live table.")]


def main() -> None:
    """Entry point of `flower-simulate`."""
    try:
        run_app(app)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(3) from None


@app.command()
@takes_scenario
def run(scenario: Scenario, output: Output = OutputFormat.TEXT, quiet: Quiet = False) -> None:
    """Train one model with simulated hospitals and score it on patients that none of them has."""
    from simulations.engines.processes import warm_up

    warm_up()  # before anything else here: it imports torch in another process meanwhile
    from simulations.run import run_scenario

    _finish(run_scenario(scenario, quiet=_hides_table(output, quiet), say=_voice(output)), output)


@app.command()
def resume(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run that has not completed.")
    ],
    output: Output = OutputFormat.TEXT,
    quiet: Quiet = False,
) -> None:
    """Go on with a run that was stopped or killed, from its newest checkpoint."""
    from simulations.run import resume_run

    _finish(resume_run(folder, quiet=_hides_table(output, quiet), say=_voice(output)), output)


@app.command()
def data(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the images.")],
    layout: Annotated[Layout, typer.Option(help="How the images lie there.")] = Layout.FOLDERS,
    hospitals: Annotated[int, typer.Option(min=1, help="Sites, each with its own scanner.")] = 3,
    patients: Annotated[int, typer.Option(min=4, help="Patients of each site.")] = 100,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Side of the images in pixels.")] = 64,
    visits: Annotated[
        bool, typer.Option("--visits", help="Patients come again: an opacity grows, stays or shrinks.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same images.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace generated images there.")] = False,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Write generated chest films: phantoms of nobody, to try everything with."""
    from simulations.generated_data import NOTICE, write_generated_data

    path = write_generated_data(
        folder,
        layout=layout.value,
        hospitals=hospitals,
        patients_per_hospital=patients,
        image_size=image_size,
        seed=seed,
        visits=visits,
        overwrite=overwrite,
    )
    if output is OutputFormat.JSON:
        print(json.dumps({"data": str(path), "layout": layout.value, "notice": NOTICE}))
    else:
        series = " --series visits --task progression --model lstm" if visits else ""
        print(f"{NOTICE}\nflower-simulate run --data {path} --partition column:site{series}")


def _voice(output: OutputFormat) -> Callable[[str], None]:
    from simulations.run import say_on_stderr

    return say_on_stderr if output is OutputFormat.JSON else _say


def _say(line: str) -> None:
    print(line, flush=True)


def _hides_table(output: OutputFormat, quiet: bool) -> bool:
    return quiet or output is OutputFormat.JSON


def _finish(outcome: "Outcome", output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print(json.dumps(outcome.result, indent=2))
    raise SystemExit(int(outcome.exit_code))


mount_audit(app)
mount_bench(app)
mount_compare(app)
mount_ensemble(app)

if __name__ == "__main__":
    main()
