"""What files hold, remembered from the last start: a file that stayed as it was is not read again.

`content-hashes.json` in the hospital's cache folder has, for each file of the last start, its inode, size,
times of change and the SHA-256 of its content; no name. A file is the same as then when all of these are:
writing to one, replacing it or setting its modification time back changes its inode or the time (ctime) that
only the kernel sets. What was changed less than two seconds before it was hashed is hashed again, since a
clock's tick could hide a second change. At worst, on a file system that lies, a picture is trained on as it
was before, and counted in the ledger as that picture: its pixels and its fingerprint come from one reading.
"""

import json
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from client.images.decode import content_digest, read_content
from common.files import write_bytes_atomically

FILE: Final = "content-hashes.json"
_SCHEMA: Final = 1
_SETTLED_NS: Final = 2_000_000_000

Stamp = tuple[int, int, int, int]
"""Inode, bytes, times of modification and of change in nanoseconds."""


class SeenFiles:
    """Hashes of files' contents, from the last start where they still hold; without a folder never."""

    def __init__(self, folder: Path | None, *, max_pixels: int) -> None:
        self._path = None if folder is None else folder / FILE
        self._max_pixels = max_pixels
        self._before = _read(self._path, max_pixels)
        self._now: dict[Stamp, str] = {}

    def digest(self, path: str) -> str:
        """SHA-256 of the content of a regular file; safe to be called by several threads. Raises Unusable."""
        stamp = _stamp(path)
        known = None if stamp is None else self._before.get(stamp)
        if known is None:
            known = content_digest(read_content(path, max_pixels=self._max_pixels))
            if stamp is None or stamp != _stamp(path) or time.time_ns() - max(stamp[2:]) < _SETTLED_NS:
                return known
        if stamp is not None:
            self._now[stamp] = known
        return known

    def keep(self) -> None:
        """Remember the files of this start, and no others; without effect where the disk takes nothing."""
        if self._path is None or self._now == self._before:
            return
        files = [[*stamp, digest] for stamp, digest in self._now.items()]
        content = {"schema": _SCHEMA, "max_pixels": self._max_pixels, "files": files}
        with suppress(OSError):
            write_bytes_atomically(self._path, json.dumps(content).encode(), mode=0o600)

    def forget(self) -> None:
        """Have every file read at the next start."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()


def _stamp(path: str) -> Stamp | None:
    """None for what is no regular file."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path | None, max_pixels: int) -> dict[Stamp, str]:
    """What was kept under the same limit; nothing where it is damaged or of somebody else."""
    if path is None:
        return {}
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_uid != os.geteuid():
                return {}
            content = json.load(file)
        if (content["schema"], content["max_pixels"]) != (_SCHEMA, max_pixels):
            return {}
        return {(int(a), int(b), int(c), int(d)): str(digest) for a, b, c, d, digest in content["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
