"""`flower-simulate`: many hospitals on one machine. Heavy imports wait until a command needs them.

From the command line: `flower-simulate --help`.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import ConfigError, DataError, FederationError, ModelError
from simulations.flags import takes_scenario
from simulations.scenario import Scenario

if TYPE_CHECKING:
    from simulations.run import Outcome

HELP = """Train with simulated hospitals on this machine.

flower-simulate run                      five hospitals of generated chest films\n
flower-simulate run --data images.npz    your own images

Exit codes: 0 completed, 1 failed, 2 bad configuration or data, 3 stopped, 4 quorum lost, 5 budget exhausted.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Format(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"


class Layout(StrEnum):
    """Layouts of generated data."""

    NPZ = "npz"
    FOLDERS = "folders"
    CSV = "csv"


Output = Annotated[Format, typer.Option("--format", help="text for people, json (result.json) for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No live table.")]


def main() -> None:
    """Entry point: errors of ours are three lines, a traceback only with --debug."""
    try:
        # `--debug` may stand anywhere: nobody wants to learn where.
        app([argument for argument in sys.argv[1:] if argument != "--debug"])
    except (FederationError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        text = str(error) if isinstance(error, FederationError) else f"{error.filename}: {error.strerror}"
        print(text, file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError | DataError | ModelError) else 1) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(3) from None


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of all commands."""


@app.command()
@takes_scenario
def run(scenario: Scenario, output: Output = Format.TEXT, quiet: Quiet = False) -> None:
    """Train one model with simulated hospitals and score it on patients that none of them has."""
    from simulations.run import run_scenario

    _finish(run_scenario(scenario, quiet=_hides_table(output, quiet), say=_voice(output)), output)


@app.command()
def resume(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run that has not completed.")
    ],
    output: Output = Format.TEXT,
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
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same images.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace generated images there.")] = False,
    output: Annotated[Format, typer.Option("--format", help="text or json.")] = Format.TEXT,
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
        overwrite=overwrite,
    )
    if output is Format.JSON:
        print(json.dumps({"data": str(path), "layout": layout.value, "notice": NOTICE}))
    else:
        print(f"{NOTICE}\nflower-simulate run --data {path} --partition column:site")


def _mount_commands_of_others() -> None:
    """Take in the commands that have a module of their own, each loaded when it is used."""
    if importlib.util.find_spec("simulations.compare_commands") is not None:
        from simulations.compare_commands import mount

        mount(app)


def _voice(output: Format) -> Callable[[str], None]:
    from simulations.run import say_on_stderr

    return say_on_stderr if output is Format.JSON else _say


def _say(line: str) -> None:
    print(line, flush=True)


def _hides_table(output: Format, quiet: bool) -> bool:
    return quiet or output is Format.JSON


def _finish(outcome: "Outcome", output: Format) -> None:
    if output is Format.JSON:
        print(json.dumps(outcome.result, indent=2))
    raise SystemExit(int(outcome.exit_code))


_mount_commands_of_others()

if __name__ == "__main__":
    main()
