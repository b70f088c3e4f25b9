"""Durable files: written whole or not at all, hashed, and listed in a manifest."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def write_bytes_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content` so that a crash leaves the old file or the new one, never a torn one."""
    write_atomically(path, lambda temporary: _write(temporary, content), mode=mode)


def write_atomically(path: Path, write: Callable[[Path], object], *, mode: int = 0o644) -> None:
    """The same with what `write` writes into the file whose path it is given: it is there, empty."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o777 if mode & 0o077 else 0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        write(temporary)
        os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)


def write_json_atomically(path: Path, content: Any, *, mode: int = 0o644) -> None:
    """Write `content` as readable JSON with `write_bytes_atomically`; NaN and infinity are refused."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes_atomically(path, text.encode(), mode=mode)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str, *, mode: int = 0o644, durable: bool = False) -> None:
    """Append one line to a text file in a single write; `durable` also waits for the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode)
    try:
        content = (line + "\n").encode()
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, "a line was written in part", str(path))
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the content of `path`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, names: Iterable[str], *, mode: int = 0o644) -> None:
    """Write `manifest.json` with the SHA-256 and size of each named file in `folder`."""
    files = {
        name: {"sha256": sha256_of_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
    }
    write_json_atomically(folder / "manifest.json", {"files": files}, mode=mode)


def manifest_problem(folder: Path, *, required: Iterable[str] = ()) -> str | None:
    """Say what is wrong with `folder` against its manifest, or None when every file is as it was written.

    Files named in `required` must be listed: an empty manifest would vouch for an empty folder.
    """
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        if unlisted := sorted(set(required) - set(files)):
            return f"{unlisted[0]} is not in the manifest"
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or sha256_of_file(path) != entry["sha256"]:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is missing or unreadable"
    return None
