"""The ledger's files: SQLite, hash chains, a head beside the database, and the site's key.

Durability: rollback journal with synchronous=EXTRA, so a committed charge survives a power cut. Every
operation opens its own connection: nothing is carried over a fork, and many processes are exact.
Evidence: each row carries the hash of the one before; the number of rows and the last hash stand in the
database and in `head.json`, with the SHA-256 of the database file. A changed byte, a removed row or an older
database is refused. Putting back an older copy of the whole folder cannot be seen from inside it: that is
what receipts outside it are for (`client.ledger.receipts`).
"""

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from client.ledger.records import EVERYBODY, DamagedLedgerError, Finding
from client.site_lock import site_lock
from common.errors import LedgerError
from common.files import sha256_of_file, write_bytes_atomically, write_json_atomically

SCHEMA_VERSION = 1
CHAINED = ("charges", "seals")
GENESIS = "0" * 64
_BUSY_S = 60.0

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE cohorts (digest TEXT PRIMARY KEY, size INTEGER NOT NULL, members BLOB NOT NULL) STRICT;
CREATE TABLE charges (
    number INTEGER PRIMARY KEY, run_id TEXT NOT NULL, attempt INTEGER NOT NULL, round_number INTEGER NOT NULL,
    model_hash TEXT NOT NULL, purpose TEXT NOT NULL, cohort TEXT NOT NULL REFERENCES cohorts (digest),
    sampling_rate REAL, noise_multiplier REAL, steps INTEGER, l2_clip_norm REAL, unit TEXT NOT NULL,
    delta REAL NOT NULL, claims_privacy INTEGER NOT NULL, epsilon REAL, recipient TEXT NOT NULL,
    plan_digest TEXT NOT NULL, time TEXT NOT NULL, previous_hash TEXT NOT NULL, hash TEXT NOT NULL,
    UNIQUE (run_id, attempt, round_number, model_hash, purpose)
) STRICT;
CREATE TABLE seals (
    number INTEGER PRIMARY KEY, charge INTEGER NOT NULL UNIQUE REFERENCES charges (number),
    sha256 TEXT NOT NULL, time TEXT NOT NULL, previous_hash TEXT NOT NULL, hash TEXT NOT NULL
) STRICT;
CREATE TRIGGER charges_stay BEFORE UPDATE ON charges BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER charges_remain BEFORE DELETE ON charges BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER seals_stay BEFORE UPDATE ON seals BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER seals_remain BEFORE DELETE ON seals BEGIN SELECT RAISE(ABORT, 'append only'); END;
"""


class LedgerStore:
    """The files of one ledger folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "ledger.sqlite"
        self._head_file = folder / "head.json"
        self._key_file = folder / "site.key"

    def prepare(self, *, create: bool, key: bytes = b"") -> bytes:
        """Make an empty ledger where there is none, check which files there are, return the site's key."""
        if create:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.chmod(0o700)
        elif not self.database.exists() and not self._key_file.exists():
            raise DamagedLedgerError(
                f"there is no ledger in {self.folder}", fix="name the folder of a ledger"
            )
        with self._locked():
            if create and not self._key_file.exists():
                self._create(key or secrets.token_bytes(32))
            return self._read_key()

    def require_intact(self) -> None:
        """Raise LedgerError for the first problem; a head that a crash left one step behind is renewed."""
        with self.examining() as connection:
            if found := self.problems(connection):
                raise _damaged(found[0].message)
            self._write_head(connection)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A consistent view of the ledger."""
        with self._connection() as connection:
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def examining(self) -> Iterator[sqlite3.Connection]:
        """The ledger while nobody writes, for `problems`."""
        with self._locked(), self._connection() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One exclusive transaction; on leaving it is on disk, on an exception nothing happened."""
        with self._locked(), self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            if found := self._head_problems(connection):
                raise _damaged(found[0].message)
            yield connection
            if connection.total_changes:
                connection.execute("COMMIT")
                self._write_head(connection)

    def append(self, connection: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> int:
        """Add a row to a chained table; returns its number. Call inside `writing`."""
        count, last = _head(connection, table)
        full = {"number": count + 1, **row, "previous_hash": last}
        full["hash"] = row_hash(full)
        names = ", ".join(full)
        marks = ", ".join("?" * len(full))
        connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(full.values()))
        _set_meta(connection, table, json.dumps([count + 1, full["hash"]]))
        return count + 1

    def problems(self, connection: sqlite3.Connection) -> list[Finding]:
        """Everything that is not as it was written: file, chains, heads, cohorts."""
        integrity = [row[0] for row in connection.execute("PRAGMA integrity_check")]
        if integrity != ["ok"]:
            return [Finding(kind="file", message=f"the database is damaged ({integrity[0][:120]})")]
        found = [finding for table in CHAINED for finding in _chain_problems(connection, table)]
        found += self._head_problems(connection)
        found += _cohort_problems(connection)
        head = self._read_head()
        is_current = head and all(head.get(table) == list(_head(connection, table)) for table in CHAINED)
        if not found and head and is_current and head.get("database") != sha256_of_file(self.database):
            found.append(Finding(kind="file", message="the database file was changed outside of the ledger"))
        return found

    def _create(self, key: bytes) -> None:
        if self.database.exists() and not self._is_unused():
            raise DamagedLedgerError(
                f"the site's key is missing beside the ledger in {self.folder}",
                why="without it no patient can be recognised, and what was spent would be forgotten",
                fix="restore site.key from a backup of that folder",
            )
        for leftover in (self.database.with_name(f"{self.database.name}-journal"), self.database):
            leftover.unlink(missing_ok=True)
        os.close(os.open(self.database, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with self._connection() as connection:
            connection.executescript(f"BEGIN; {_SCHEMA}")
            _set_meta(connection, "schema", str(SCHEMA_VERSION))
            _set_meta(connection, "key-check", _key_check(key))
            for table in CHAINED:
                _set_meta(connection, table, json.dumps([0, GENESIS]))
            connection.execute("COMMIT")
            self._write_head(connection)
        # The key comes last: it says that the ledger is complete.
        write_bytes_atomically(self._key_file, key, mode=0o600)

    def _is_unused(self) -> bool:
        try:
            with self._connection() as connection:
                tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                return not tables or not connection.execute("SELECT count(*) FROM charges").fetchone()[0]
        except LedgerError:
            return self.database.stat().st_size == 0

    def _read_key(self) -> bytes:
        for path in (self._key_file, self.database, self._head_file):
            if not path.is_file():
                raise DamagedLedgerError(
                    f"{path.name} is missing in {self.folder}",
                    why="the ledger was here before; starting again would forget what was spent",
                    fix="restore the whole folder from its newest backup",
                )
        key = self._key_file.read_bytes()
        with self.reading() as connection:
            stored = dict(connection.execute("SELECT name, value FROM meta"))
        if stored.get("schema") != str(SCHEMA_VERSION):
            raise LedgerError(
                f"the ledger has schema {stored.get('schema')}, this release reads {SCHEMA_VERSION}",
                fix="use the release that wrote it, or a newer one",
            )
        if not hmac.compare_digest(stored.get("key-check", ""), _key_check(key)):
            raise _damaged("site.key does not belong to this ledger")
        return key

    def _locked(self) -> Any:
        return site_lock(self.folder, timeout_s=_BUSY_S, name="ledger.lock")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            uri = f"{self.database.absolute().as_uri()}?mode=rw"
            connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_S)
            with closing(connection):
                connection.execute("PRAGMA journal_mode = DELETE")
                connection.execute("PRAGMA synchronous = EXTRA")
                connection.execute("PRAGMA foreign_keys = ON")
                yield connection
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise _damaged(f"the database cannot be used ({str(error)[:120]})") from None

    def _head_problems(self, connection: sqlite3.Connection) -> list[Finding]:
        head = self._read_head()
        if head is None:
            return [Finding(kind="head", message="head.json is missing or unreadable")]
        found = []
        for table in CHAINED:
            count, last = head[table]
            held, newest = _head(connection, table)
            # A crash between commit and head leaves the head behind: then it must be inside the chain.
            if held < count:
                found.append(Finding(kind="head", message=f"{table}: {count - held} of {count} are missing"))
            elif last != (newest if held == count else _hash_at(connection, table, count)):
                found.append(Finding(kind="head", message=f"{table}: other content than head.json recorded"))
        return found

    def _read_head(self) -> dict[str, Any] | None:
        try:
            head = json.loads(self._head_file.read_text())
            for table in CHAINED:
                count, last = head[table]
                if type(count) is not int or type(last) is not str:
                    return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return dict(head)

    def _write_head(self, connection: sqlite3.Connection) -> None:
        head: dict[str, Any] = {table: list(_head(connection, table)) for table in CHAINED}
        head["database"] = sha256_of_file(self.database)
        if head != self._read_head():
            write_json_atomically(self._head_file, head, mode=0o600)


def row_hash(row: Mapping[str, Any]) -> str:
    """SHA-256 over all columns of a chained row but its own hash."""
    content = {name: value for name, value in row.items() if name != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def rows_of(connection: sqlite3.Connection, table: str, **equal: str | int) -> list[dict[str, Any]]:
    """Rows of a chained table in order, as column -> value; all, or those where these columns are equal."""
    where = "WHERE " + " AND ".join(f"{name} = :{name}" for name in equal) if equal else ""
    cursor = connection.execute(f"SELECT * FROM {table} {where} ORDER BY number", equal)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def _chain_problems(connection: sqlite3.Connection, table: str) -> list[Finding]:
    found, previous = [], GENESIS
    rows = rows_of(connection, table)
    for expected, row in enumerate(rows, start=1):
        if row["number"] != expected or row["previous_hash"] != previous or row["hash"] != row_hash(row):
            message = f"{table}: line {row['number']} was altered, or lines before it were removed"
            found.append(Finding(kind="chain", message=message, charge=row["number"]))
        previous = row["hash"]
    if _head(connection, table) != (len(rows), previous):
        found.append(Finding(kind="chain", message=f"{table}: the last lines were removed or added by hand"))
    return found


def _cohort_problems(connection: sqlite3.Connection) -> list[Finding]:
    found = []
    for digest, size, members in connection.execute("SELECT digest, size, members FROM cohorts"):
        if (digest, size, members) == (EVERYBODY, 0, b""):
            continue
        if len(members) != 32 * size or hashlib.sha256(members).hexdigest() != digest:
            found.append(Finding(kind="cohort", message=f"cohort {digest[:12]} does not match its digest"))
    return found


def _head(connection: sqlite3.Connection, table: str) -> tuple[int, str]:
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (table,)).fetchone()
    try:
        count, last = json.loads(row[0])
        return int(count), str(last)
    except (TypeError, ValueError):
        raise _damaged(f"the head of {table} is unreadable") from None


def _hash_at(connection: sqlite3.Connection, table: str, number: int) -> str:
    row = connection.execute(f"SELECT hash FROM {table} WHERE number = ?", (number,)).fetchone()
    return str(row[0]) if row else GENESIS


def _set_meta(connection: sqlite3.Connection, name: str, value: str) -> None:
    connection.execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", (name, value))


def _key_check(key: bytes) -> str:
    return hmac.new(key, b"this key belongs to this ledger", hashlib.sha256).hexdigest()


def _damaged(why: str) -> DamagedLedgerError:
    return DamagedLedgerError(
        "the privacy ledger is damaged or was altered, nothing is trained",
        why=why,
        fix="restore the whole ledger folder from its newest backup, or see what `flower-client ledger "
        "recover` can do from receipts",
    )
