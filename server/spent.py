"""`spent.json`: the newest totals of the hospitals, also of rounds that no checkpoint holds.

Written before each question and after its answers, so an abandoned round, a crash and a resume lose nothing.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from common.errors import CheckpointError
from common.files import write_json_atomically
from server.run_state import RunState
from server.totals import HospitalTotals, OpenQuestion, totals_from

SCHEMA = 1

log = logging.getLogger(__name__)


def write_spent(path: Path, *, run_id: str, hospitals: Mapping[str, HospitalTotals]) -> None:
    """Replace the file. Raises CheckpointError when the disk does not take it."""
    totals = {name: asdict(hospital) for name, hospital in sorted(hospitals.items())}
    try:
        write_json_atomically(path, {"schema": SCHEMA, "run_id": run_id, "hospitals": totals})
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be written",
            why=error.strerror or type(error).__name__,
            fix="free disk space, then resume",
        ) from None


def with_spent(state: RunState, path: Path) -> RunState:
    """The restored state with everything that was released since; aggregated rounds are the checkpoint's.

    Where the file is lost, every hospital may have released more than the checkpoint knows, and is marked so.
    """
    newest = _read(path, state.run_id)
    if newest is None:
        log.warning("%s is lost: no epsilon is complete until its hospital answers again", path.name)
        now = time.time()
        lost = OpenQuestion(key=f"0/{state.round_number}/lost", asked=now, until=now)
        return replace(state, hospitals={name: t.asked(lost) for name, t in state.hospitals.items()})
    merged = dict(state.hospitals)
    for name, totals in newest.items():
        known = state.hospitals.get(name)
        merged[name] = replace(totals, rounds=known.rounds if known else 0)
    return replace(state, hospitals=merged)


def _read(path: Path, run_id: str) -> dict[str, HospitalTotals] | None:
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA or content["run_id"] != run_id:
            return None
        return {name: totals_from(fields) for name, fields in content["hospitals"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
