"""Flower's database: whether the installed Flower can go on with it (else it ends with code 105)."""

import logging
import sqlite3
import time
from contextlib import closing
from enum import StrEnum
from pathlib import Path

_MESSAGES = (
    *("object_push_session_roots", "object_push_session_pending", "object_push_sessions"),
    *("object_children", "run_objects", "objects", "message_res", "message_ins"),
)
"""Flower's tables of messages and their content, those that refer to others first."""
_TIDY_S = 60.0

log = logging.getLogger(__name__)


class DatabaseState(StrEnum):
    """What the installed Flower would make of the database."""

    MISSING = "not made yet: the first start makes it"
    CURRENT = "as this Flower writes it"
    OLDER = "of an older Flower: the next start migrates it"
    UNKNOWN = "of another Flower, or altered: its schema is not one that this Flower knows"
    DAMAGED = "damaged"


def database_state(path: Path) -> DatabaseState:
    """Look at the schema's revision, without changing anything; works while the server runs."""
    if not path.is_file() or path.stat().st_size == 0:
        return DatabaseState.MISSING
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            sound = database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
            tables = {
                row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            }
            versioned = "alembic_version" in tables
            rows = database.execute("SELECT version_num FROM alembic_version").fetchall() if versioned else []
    except sqlite3.Error:
        return DatabaseState.DAMAGED
    if not sound:
        return DatabaseState.DAMAGED
    if not tables:
        return DatabaseState.MISSING
    revisions, (known, heads) = {str(row[0]) for row in rows}, _revisions()
    if not revisions or not revisions <= known:
        return DatabaseState.UNKNOWN
    return DatabaseState.CURRENT if revisions == heads else DatabaseState.OLDER


def tidy(path: Path, *, patience_s: float = _TIDY_S) -> None:
    """Forget what runs that are over have left in it, and give the space back to the disk.

    Only while no SuperLink runs: then every message in it is of a run that will be stopped. Without effect
    when the disk is full, the database is damaged or of another Flower, or time is over.
    """
    if not path.is_file():
        return
    give_up_at = time.monotonic() + patience_s
    try:
        with closing(sqlite3.connect(path, timeout=patience_s, isolation_level=None)) as database:
            database.set_progress_handler(lambda: time.monotonic() > give_up_at, 100_000)
            rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            database.execute("BEGIN IMMEDIATE")
            for table in [name for name in _MESSAGES if (name,) in rows]:
                database.execute(f"DELETE FROM {table}")
            database.execute("COMMIT")
            database.execute("VACUUM")
    except sqlite3.Error as error:
        log.warning("%s was not tidied up: %s", path.name, error)


def _revisions() -> tuple[set[str], set[str]]:
    """Every schema revision that the installed Flower knows, and the newest."""
    from alembic.script import ScriptDirectory
    from flwr.supercore.state.alembic.utils import ALEMBIC_DIR

    scripts = ScriptDirectory(str(ALEMBIC_DIR))
    return {script.revision for script in scripts.walk_revisions()}, set(scripts.get_heads())
