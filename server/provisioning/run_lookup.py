"""Which run a command means, and what the next start would do with it."""

from pathlib import Path

from common.config import FederationConfig
from common.errors import ConfigError, FederationError
from common.machine import is_locked
from server.provisioning.operator_config import FEDERATION, OperatorFolder
from server.reporting.run_overview import INTERRUPTED, RUNNING, state_of
from server.reporting.run_record import CONFIG, FINISHED, RESULT, read_run


def find_run(run: str | None, *, directory: Path | None, runs: Path | None) -> Path:
    """The folder of a run: named by path, by its id, or (None) the current run of the operator's folder.

    Raises ConfigError when nothing is named and there is no operator's folder, or it has had no run.
    """
    if run is not None:
        by_id = runs_folder(directory=directory, runs=runs) / run
        return by_id if not Path(run).is_dir() and by_id.is_dir() else Path(run)
    folder = operator_folder(directory)
    if folder is None:
        raise ConfigError(
            "no run is named",
            why=f"without RUN the current run is meant, and there is no {FEDERATION} here",
            fix="name a run, or go to the federation's folder, or name it with --dir",
        )
    current = folder.run_folder()
    if current is None:
        raise ConfigError(f"{folder.path} has had no run", fix="begin one with flower-server start")
    return current


def runs_folder(*, directory: Path | None, runs: Path | None) -> Path:
    """Folder that holds the runs: as asked for, else that of the operator's folder, else `runs`."""
    if runs is not None:
        return runs
    folder = operator_folder(directory)
    return Path("runs") if folder is None else folder.runs


def operator_folder(directory: Path | None) -> OperatorFolder | None:
    """The operator's folder that is named, or the working directory when it is one. Raises ConfigError."""
    folder = OperatorFolder(directory or Path())
    if directory is not None:
        folder.config()
    return folder if folder.federation_toml.is_file() else None


def describe_run(path: Path) -> tuple[str, str]:
    """In words: how the run stands, and what to do about it (empty when the next start goes on by itself)."""
    if path.is_dir() and not has_begun(path):
        return f"{path.name}: not begun; the next start begins it", ""
    try:
        record = read_run(path)
    except FederationError as error:
        return error.what, "begin a new run: flower-server start --new"
    state, closed = state_of(record), max((r.round_number for r in record.rounds), default=0)
    planned = f" of {record.config.federation.rounds}" if record.config else ""
    result = f"{record.run_id}: {state} after round {closed}{planned}"
    if state == RUNNING:
        return result, ""
    if state == INTERRUPTED:
        return f"{result}; the next start goes on with it", ""
    if state in FINISHED:
        return result, "begin a new run: flower-server start --new"
    return result, "go on with flower-server resume, or begin a new run: flower-server start --new"


def has_begun(path: Path) -> bool:
    """Whether a run has left anything: a server writes its settings once the app has started."""
    return (path / CONFIG).is_file() or (path / RESULT).is_file()


def changed_settings(path: Path, config: FederationConfig) -> list[str]:
    """Settings of `config` that an unfinished run does not allow to be changed any more, by key."""
    from server.run_state import frozen_settings  # numpy and Flower, which no other command here needs

    try:
        record = read_run(path)
    except FederationError:
        return []
    if record.config is None or state_of(record) in FINISHED:
        return []
    began, now = frozen_settings(record.config), frozen_settings(config)
    return sorted(key for key in {*began, *now} if began.get(key) != now.get(key))


def choose_run(folder: OperatorFolder, run: str) -> Path:
    """A run of this folder, by path or id, to be resumed; changes nothing. Raises ConfigError for none."""
    path = find_run(run, directory=folder.path, runs=folder.runs).absolute()
    read_run(path)
    named = folder.config().runtime.run_folder
    if named and (folder.path / named).resolve() != path.resolve():
        raise ConfigError(
            f"{folder.federation_toml} names another run",
            why=f"[runtime] run-folder = {named!r}",
            fix="take it out there, or resume without RUN",
        )
    if is_locked(folder.lock):
        raise ConfigError(
            f"the server of {folder.path} is running",
            why="a run can be changed only while no server works on one",
            fix="end it first: flower-server stop, or Ctrl-C where it runs",
        )
    return path
