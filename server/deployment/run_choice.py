"""Which run folder a start works in: the unfinished one, the one that is resumed, or a new one."""

from pathlib import Path

from common.errors import ConfigError
from server.provisioning.operator_config import OperatorConfig, OperatorFolder
from server.reporting.run_record import FINISHED, read_object
from server.run_folder import RESULT, STOP, new_run_id


def choose_folder(
    folder: OperatorFolder, config: OperatorConfig, *, new: bool, resume: bool, run: Path | None = None
) -> Path:
    """The folder of the run to work on; changes nothing. Raises ConfigError."""
    if new and resume:
        raise ConfigError("a run is either new or resumed", fix="use one of start --new and resume")
    named = config.runtime.run_folder
    current = run or (folder.path / named if named else folder.run_folder())
    if new and named:
        raise ConfigError(
            "federation.toml names the run folder",
            why=f"[runtime] run-folder = {named!r}",
            fix="take it out there",
        )
    if resume and (current is None or not current.is_dir()):
        raise ConfigError("there is no run to resume", fix="begin one with flower-server start")
    if new or current is None:
        current = folder.runs / new_run_id(config.federation.name)
    _may_go_on(current, resume=resume)
    return current


def take_run(folder: OperatorFolder, run: Path, *, resume: bool) -> None:
    """Make `run` the current one, ready to go on."""
    run.mkdir(parents=True, exist_ok=True)
    if resume:
        forget_result(run)
        (run / STOP).unlink(missing_ok=True)
    folder.remember_run(run)


def status_of(run: Path) -> str | None:
    """How the last session of a run ended; None when it did not end by itself."""
    try:
        result = read_object(run / RESULT)
    except (ConfigError, OSError):  # damaged: it is for a person to say whether to go on
        return "failed"
    return str(result["status"]) if "status" in result else None


def forget_result(run: Path) -> None:
    """Take away what a session said when it ended, because another one goes on."""
    (run / RESULT).unlink(missing_ok=True)


def _may_go_on(run: Path, *, resume: bool) -> None:
    status = status_of(run)
    if status is None or (resume and status != "completed"):
        return
    if status in FINISHED:
        raise ConfigError(
            f"the run {run.name} is {status}",
            why="there is nothing left to train in it",
            fix="begin a new one with flower-server start --new",
        )
    raise ConfigError(
        f"the run {run.name} is {status}",
        why="it ended there, and does not go on by itself",
        fix="go on with flower-server resume, or begin a new one with flower-server start --new",
    )
