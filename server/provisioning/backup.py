"""Backups: everything that makes a federation and its runs, in one `.tar.gz` that only its owner can read.

It holds private keys: keep it as you keep them. What a hospital has trained and charged lies at the hospital,
so restoring an older backup never undoes a charge.
"""

import importlib.metadata
import io
import json
import os
import sqlite3
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO

from common.errors import ConfigError, FederationError
from common.files import sync_folder
from server.provisioning.folder_parts import make_parts, new_folder
from server.provisioning.operator_config import FEDERATION, OperatorFolder
from server.provisioning.roster import read_roster

SCHEMA = 1
LABEL = "backup.json"
DATABASE = "state/superlink.db"
_FILES = (FEDERATION, "roster.json", "state/current-run")
_FOLDERS = ("ca", "tls", "secrets", "enrolments", "receipts")
_NOT_KEPT = frozenset({".lock", "spool"})
_LARGEST_LABEL = 2**16


def write_backup(folder: OperatorFolder, out: Path) -> int:
    """Write the backup, also while the server runs, and give the number of files in it.

    Raises ConfigError rather than write over a file; FederationError when the disk does not take it.
    """
    name = folder.config().federation.name
    if out.exists():
        raise ConfigError(f"{out} exists already", fix="choose another file, or move that one away")
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            number = _write_archive(folder, name, file)
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, out)  # fails, unlike a rename, when somebody made `out` meanwhile
        sync_folder(out.parent)
    except (OSError, sqlite3.Error) as error:
        raise FederationError(
            f"the backup {out} cannot be written",
            why=str(error),
            fix="look for free disk space and write permission there, then try again",
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return number


def restore_backup(archive: Path, path: Path) -> OperatorFolder:
    """Unpack a backup into a new or empty folder. Raises ConfigError when it is none or `path` not empty."""
    if not archive.is_file():
        raise ConfigError(f"there is no file {archive}", fix="name a file of flower-server backup")
    with new_folder(path) as folder:
        try:
            with tarfile.open(archive, "r:gz") as tar:
                _check_label(archive, tar)
                for member in tar:
                    _unpack(tar, member, folder)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise _no_backup(archive, str(error)) from None
        make_parts(folder)
        folder.config()
        read_roster(folder.roster)
    return folder


def _write_archive(folder: OperatorFolder, name: str, file: IO[bytes]) -> int:
    number = 0
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=3) as tar:
        label = {
            "schema": SCHEMA,
            "federation": name,
            "release": importlib.metadata.version("hospital-federation"),
            "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        _add(tar, LABEL, io.BytesIO(json.dumps(label).encode()))
        if folder.database.is_file():
            _add_database(tar, folder.database)
            number += 1
        for path in _files_of(folder):
            try:
                with path.open("rb") as content:
                    _add(tar, path.relative_to(folder.path).as_posix(), content)
            except FileNotFoundError:
                continue  # an old checkpoint that a running server has just dropped
            number += 1
    return number


def _files_of(folder: OperatorFolder) -> Iterator[Path]:
    yield from (folder.path / name for name in _FILES)
    for name in _FOLDERS:
        yield from _files_below(folder.path / name)
    if folder.runs.is_dir():
        for run in sorted(folder.runs.iterdir()):
            # Checkpoints first: a record may be ahead of its checkpoint, never behind it.
            yield from _files_below(run / "checkpoints")
            yield from (path for path in _files_below(run) if run / "checkpoints" not in path.parents)


def _files_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        unfinished = any(part.endswith(".tmp") for part in parts)
        if path.is_file() and not path.is_symlink() and not unfinished and not _NOT_KEPT & set(parts):
            yield path


def _add_database(tar: tarfile.TarFile, database: Path) -> None:
    """Add a copy at one moment in time, whatever is being written."""
    with tempfile.TemporaryDirectory(dir=database.parent) as aside:
        copy = Path(aside) / "copy.db"
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        with copy.open("rb") as content:
            _add(tar, DATABASE, content, mode=0o600)


def _add(tar: tarfile.TarFile, name: str, content: IO[bytes], *, mode: int = 0o600) -> None:
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = mode, int(time.time())
    # A log that grows meanwhile is kept as long as it is now; files that are replaced stay whole.
    info.size = content.seek(0, io.SEEK_END)
    content.seek(0)
    tar.addfile(info, content)


def _check_label(archive: Path, tar: tarfile.TarFile) -> None:
    first = tar.next()
    if first is None or first.name != LABEL or not first.isfile() or first.size > _LARGEST_LABEL:
        raise _no_backup(archive, f"it does not begin with {LABEL}")
    content = tar.extractfile(first)
    try:
        schema = json.loads(content.read())["schema"] if content else None
    except (ValueError, KeyError, TypeError):
        schema = None
    if schema != SCHEMA:
        raise _no_backup(archive, f"its schema is {schema!r}, this release reads {SCHEMA}")


def _unpack(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: OperatorFolder) -> None:
    """Write one file below `folder`, readable by its owner only."""
    if member.name == LABEL:
        return
    name = PurePosixPath(member.name)
    content = tar.extractfile(member) if member.isfile() else None
    below = len(name.parts) > 1 and name.parts[0] in (*_FOLDERS, "runs")
    known = member.name in (*_FILES, DATABASE) or below
    if content is None or not known or name.is_absolute() or ".." in name.parts:
        raise tarfile.TarError(f"it holds {member.name!r}, which no backup has")
    target = folder.path.joinpath(*name.parts)
    for parent in reversed(target.relative_to(folder.path).parents):
        (folder.path / parent).mkdir(exist_ok=True, mode=0o700)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while piece := content.read(2**20):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _no_backup(archive: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{archive} cannot be restored",
        why=why,
        fix="name a whole file that flower-server backup has written",
    )
