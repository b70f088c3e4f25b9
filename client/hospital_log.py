"""`state/hospital.log`: why a round was refused or failed, in full words; never leaves, never above 10 MB."""

import os
import re
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from common.errors import FederationError, Refusal, RefusalCode, printable

FILE = "hospital.log"
LARGEST = 10 * 2**20
"""Bytes; then the file becomes `hospital.log.1`, in place of an older one."""
_LONGEST_LINE, _LONGEST_ENTRY, _TAIL = 2_000, 200, 256 * 2**10
_HEAD = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) \[([a-z-]{1,60})\] (.*)")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One refusal or failure."""

    time: str
    """Local time, to the millisecond."""
    code: str
    """As it went to the server."""
    text: str
    """What, why, what to do; or a traceback."""


def code_of(error: BaseException) -> RefusalCode:
    """The one word about `error` that leaves the hospital."""
    if isinstance(error, Refusal):
        return error.code
    return error.refusal if isinstance(error, FederationError) else RefusalCode.INTERNAL


def write_entry(log: Path, error: BaseException) -> None:
    """Append what happened, readable by the owner only. Raises OSError.

    Lines after the first are set in: whatever a text holds, none of it can pose as another entry.
    """
    text = str(error)
    if not text or not isinstance(error, FederationError):
        text = "".join(traceback.format_exception(error))
    lines = [printable(line, most=_LONGEST_LINE) for line in text.strip().split("\n")]
    if len(lines) > _LONGEST_ENTRY:
        lines = [*lines[: _LONGEST_ENTRY // 2], "...", *lines[-_LONGEST_ENTRY // 2 :]]
    now = time.time()
    moment = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))}.{int(now % 1 * 1000):03d}"
    if log.is_file() and log.stat().st_size > LARGEST:
        os.replace(log, log.with_name(log.name + ".1"))
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(f"{moment} [{code_of(error).value}] " + "\n  ".join(lines) + "\n")


def last_entry(log: Path) -> Entry | None:
    """The newest entry; None where there is none, or none that can be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = file.read(_TAIL).decode("utf-8", errors="replace").split("\n")
    except OSError:
        return None
    for number in range(len(lines) - 1, -1, -1):
        if head := _HEAD.fullmatch(lines[number]):
            rest = [line.removeprefix("  ") for line in lines[number + 1 :] if line]
            return Entry(time=head[1], code=head[2], text="\n".join([head[3], *rest]))
    return None
