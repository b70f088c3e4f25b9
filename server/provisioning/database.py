"""Flower's database: whether the installed Flower can go on with it (else it ends with code 105)."""

import sqlite3
from contextlib import closing
from enum import StrEnum
from pathlib import Path


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


def _revisions() -> tuple[set[str], set[str]]:
    """Every schema revision that the installed Flower knows, and the newest."""
    from alembic.script import ScriptDirectory
    from flwr.supercore.state.alembic.utils import ALEMBIC_DIR

    scripts = ScriptDirectory(str(ALEMBIC_DIR))
    return {script.revision for script in scripts.walk_revisions()}, set(scripts.get_heads())
