"""Short views of runs for the terminal and for programs: `flower-server list` and `status`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import FederationError
from common.machine import is_locked
from common.pages.html import date, duration, figure, quantity, spent
from server.reporting.run_record import CONFIG, RESULT, STOP, UNFINISHED, RunRecord, read_run

if TYPE_CHECKING:
    from rich.table import Table

RUNNING, INTERRUPTED = "running", "interrupted"


def state_of(run: RunRecord) -> str:
    """`running` while a server holds the folder's lock, else the run's status; `interrupted` without one."""
    if is_locked(run.folder / ".lock"):
        return RUNNING
    return INTERRUPTED if run.status == UNFINISHED else run.status


def overview_of_runs(runs: Path) -> list[dict[str, Any]]:
    """One mapping per run folder under `runs`, newest first; a damaged one has the status `unreadable`."""
    if not runs.is_dir():
        return []
    folders = [f for f in runs.iterdir() if (f / CONFIG).is_file() or (f / RESULT).is_file()]
    newest_first = sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [_overview(folder) for folder in newest_first]


def overview_of_hospitals(run: RunRecord) -> dict[str, Any]:
    """How far a run is, and each hospital's last outcome."""
    closed = max((r.round_number for r in run.rounds), default=0)
    return _facts(run) | {
        "rounds": closed,
        "rounds_planned": run.config.federation.rounds if run.config else None,
        "stop_requested": (run.folder / STOP).exists(),
        "hospitals": [
            {
                "name": hospital.name,
                "enrolled_patients": hospital.enrolled_patients,
                "epsilon": hospital.epsilon if run.private else None,
                "epsilon_complete": hospital.epsilon_complete if run.private else None,
                "epsilon_outsider": hospital.epsilon_outsider if run.private else None,
                "budget": hospital.budget if run.private else None,
                **_last_outcome(run, hospital.name),
            }
            for hospital in run.hospitals
        ],
    }


def summary_lines(overview: Mapping[str, Any]) -> list[str]:
    """The head of `flower-server status`."""
    planned = overview["rounds_planned"]
    largest = spent(overview["epsilon"], complete=overview["epsilon_complete"])
    epsilon = f"largest epsilon {largest}" if overview["private"] else "NOT PRIVATE"
    lines = [
        f"run {overview['run_id']}: {overview['status']}",
        f"{overview['data']}, {overview['model']}, {epsilon}",
        f"round {overview['rounds']}" + (f" of {planned}" if planned else ""),
    ]
    return [*lines, "a stop was asked for"] if overview["stop_requested"] else lines


def table_of_runs(overview: Sequence[Mapping[str, Any]]) -> "Table":
    """Rows of `flower-server list`."""
    table = _table("run", "status", "data", "model", "rounds", "test AUC", "epsilon", "started")
    for run in overview:
        largest = spent(run["epsilon"], complete=run["epsilon_complete"] is not False)
        epsilon = "not private" if run["private"] is False else largest
        cells = (run["run_id"], run["status"], run["data"], run["model"], quantity(run["rounds"]))
        _add(table, *cells, figure(run["auc"]), epsilon, _minute(run["started"]))
    return table


def table_of_hospitals(overview: Mapping[str, Any]) -> "Table":
    """Rows of `flower-server status`."""
    table = _table("hospital", "enrolled", "epsilon", "budget", "last round", "outcome", "training")
    for row in overview["hospitals"]:
        why = f" ({row['code']})" if row["code"] else ""
        outcome = f"{row['outcome']}{why}" if row["outcome"] else "–"
        _add(
            table,
            row["name"],
            quantity(row["enrolled_patients"]),
            spent(row["epsilon"], 3, complete=row["epsilon_complete"] is not False),
            quantity(row["budget"]),
            quantity(row["last_round"]),
            outcome,
            duration(row["training_s"]),
        )
    return table


def _overview(folder: Path) -> dict[str, Any]:
    try:
        return _facts(read_run(folder))
    except FederationError:
        names = ("data", "model", "rounds", "auc", "private", "epsilon", "epsilon_complete", "started")
        unknown = dict.fromkeys(names)
        return {"run_id": folder.name, "folder": str(folder), "status": "unreadable"} | unknown


def _facts(run: RunRecord) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "folder": str(run.folder),
        "status": state_of(run),
        "data": run.data_name,
        "model": run.model.get("name") or (run.config.model.name if run.config else None),
        "rounds": run.result.get("rounds", max((r.round_number for r in run.rounds), default=0)),
        "auc": run.test_metrics.get("auc"),
        "private": run.private,
        "epsilon": run.epsilon_max,
        "epsilon_complete": not run.epsilon_incomplete,
        "started": run.started,
    }


def _minute(unix_seconds: float | None) -> str:
    return date(unix_seconds)[:16]


def _last_outcome(run: RunRecord, name: str) -> dict[str, Any]:
    replies = [reply for (hospital, _), reply in run.participation.items() if hospital == name]
    last = max(replies, key=lambda reply: reply.round_number, default=None)
    if last is None:
        return dict.fromkeys(("last_round", "outcome", "code", "training_s"))
    return {
        "last_round": last.round_number,
        "outcome": last.outcome,
        "code": last.code,
        "training_s": last.training_s,
    }


def _table(*header: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    return table


def _add(table: "Table", *cells: str | None) -> None:
    from rich.text import Text

    # Text, not markup: a name such as "[red]" stays what it is.
    table.add_row(*(Text(str(cell or "–")) for cell in cells))
