"""How long a hospital keeps what it no longer needs: `hospital.toml` [retention], applied.

Sealed answers, decoded images, lines of logs and received models go when they are older than their settings
say. The ledger stays for ever, approvals stay as long as their run may go on, and so does every answer of a
run that has sealed one lately: without it a repeated question would have to be refused.
"""

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from client.approval.approvals import FOLDER as APPROVALS
from client.approval.approvals import HISTORY
from client.hospital_log import FILE as HOSPITAL_LOG
from client.images.cache import FOLDER as DECODED
from client.kept_folders import KeptFolders
from client.outbox import run_prefix
from client.site_lock import CLIENT_LOCK, site_lock
from common.errors import ConfigError, LedgerError
from common.files import write_bytes_atomically
from common.hospital_config import RetentionConfig

_DAY_S = 86_400.0
_LEFTOVER_S = _DAY_S
"""Files that a killed process left half-written are no longer being written after this long."""
_GOING_ON_S = 2 * _DAY_S
"""A run that has sealed an answer since may go on."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Something that goes, or would go."""

    kind: str
    """answer, decoded images, model, approval, log lines, log, leftover"""
    path: Path
    num_bytes: int
    age_days: float


def outdated(
    folders: KeptFolders, keep: RetentionConfig, *, now: float | None = None, with_logs: bool = True
) -> list[Removal]:
    """Everything that is older than the settings allow; nothing is changed."""
    now = time.time() if now is None else now
    found = [
        *_old_answers(folders.state / "outbox", keep.outbox_days, now),
        *_old_images(folders.cache / DECODED, keep.cache_days, now),
        *_old_models(folders.state / "models", keep.models_days, now),
        *_old_approvals(folders.state / APPROVALS, max(keep.log_days, keep.outbox_days), now),
    ]
    if with_logs:
        found += [_old_lines(path, keep.log_days, now) for path in _logs_by_line(folders)]
        for path in _children(folders.logs):
            if _is_old(_changed(path), keep.log_days, now):
                found.append(_removal("log", path, now))
    return [removal for removal in found if removal.num_bytes]


def everything_of(folders: KeptFolders, run_id: str, *, now: float | None = None) -> list[Removal]:
    """All answers, models and approvals of one run, whatever their age; nothing is changed.

    Raises ConfigError for a run that has sealed an answer lately, and for one that nothing is kept of.
    """
    now = time.time() if now is None else now
    answers = sorted((folders.state / "outbox").glob(f"{run_prefix(run_id)}-*.safetensors"))
    if answers and now - max(_changed(path) for path in answers) < _GOING_ON_S:
        raise ConfigError(
            f"run {run_id} may still be going on: it has sealed an answer in the last two days",
            why="its server may ask for that answer again, and it is never formed a second time",
            fix="flower-client leave ends taking part; purge the run two days later",
        )
    kinds = {"model": folders.state / "models", "approval": folders.state / APPROVALS}
    found = [_removal("answer", path, now) for path in answers]
    for kind, parent in kinds.items():
        found += [_removal(kind, path, now) for path in _children(parent) if path.name == run_id]
    if not found:
        raise ConfigError(
            f"nothing is kept of a run {run_id}",
            why="the ledger, which is kept for ever, names the runs",
            fix="flower-client ledger show; flower-client models",
        )
    return found


def remove(removals: list[Removal], keep: RetentionConfig, *, now: float | None = None) -> None:
    """Do it: files are unlinked, logs rewritten as a whole without their old lines."""
    now = time.time() if now is None else now
    for removal in removals:
        if removal.kind == "log lines":
            kept = b"".join(line for line, is_old in _lines(removal.path, keep.log_days, now) if not is_old)
            write_bytes_atomically(removal.path, kept, mode=0o600)
        elif removal.path.is_dir() and not removal.path.is_symlink():
            shutil.rmtree(removal.path)
        else:
            removal.path.unlink(missing_ok=True)
            if removal.kind == "decoded images":
                removal.path.with_suffix(".npy").unlink(missing_ok=True)


@contextmanager
def while_no_client_runs(state: Path) -> Iterator[bool]:
    """Keep `flower-client start` from beginning meanwhile; False where it runs already.

    A log cannot be rewritten beside a process that appends to it: its next line would be lost.
    """
    try:
        lock = site_lock(state, timeout_s=0.5, name=CLIENT_LOCK)
        lock.__enter__()
    except LedgerError:
        yield False
        return
    try:
        yield True
    finally:
        lock.__exit__(None, None, None)


def purge_at_start(folders: KeptFolders, keep: RetentionConfig) -> list[Removal]:
    """Apply the settings while nobody else writes; what cannot be removed is left for the next time."""
    found = outdated(folders, keep)
    done = []
    for removal in found:
        with suppress(OSError):
            remove([removal], keep)
            done.append(removal)
    return done


def _old_answers(outbox: Path, days: float, now: float) -> Iterator[Removal]:
    """Answers of runs whose newest answer is too old: never some of a run, and never of one that goes on."""
    runs = defaultdict(list)
    for path in sorted(outbox.glob("*.safetensors")):
        runs[path.name.split("-")[0]].append(path)
    for paths in runs.values():
        if _is_old(max(_changed(path) for path in paths), max(days, _GOING_ON_S / _DAY_S), now):
            yield from (_removal("answer", path, now) for path in paths)
    yield from _leftovers(outbox, now)


def _old_images(folder: Path, days: float, now: float) -> Iterator[Removal]:
    """Entries that no run has used; the index of an entry is touched at each use."""
    for index in sorted(folder.glob("*.json")):
        if _is_old(_changed(index), days, now):
            removal = _removal("decoded images", index, now)
            pixels = index.with_suffix(".npy")
            num_bytes = removal.num_bytes + (pixels.stat().st_size if pixels.exists() else 0)
            yield replace(removal, num_bytes=num_bytes)
    for pixels in sorted(folder.glob("*.npy")):
        if not pixels.with_suffix(".json").exists() and now - _changed(pixels) > _LEFTOVER_S:
            yield _removal("leftover", pixels, now)
    yield from _leftovers(folder, now)


def _old_models(folder: Path, days: float, now: float) -> Iterator[Removal]:
    for run in filter(Path.is_dir, _children(folder)):
        newest = max((_changed(path) for path in run.rglob("*")), default=_changed(run))
        if _is_old(newest, days, now):
            yield _removal("model", run, now)


def _old_approvals(folder: Path, days: float, now: float) -> Iterator[Removal]:
    """Plans that waited in vain; what was approved stays, its run may go on."""
    for run in filter(Path.is_dir, _children(folder)):
        is_approved = (run / "approved.json").exists()
        if not is_approved and _is_old(max(map(_changed, run.rglob("*")), default=_changed(run)), days, now):
            yield _removal("approval", run, now)


def _leftovers(folder: Path, now: float) -> Iterator[Removal]:
    for path in sorted(folder.glob("*.tmp")):
        if now - _changed(path) > _LEFTOVER_S:
            yield _removal("leftover", path, now)


def _logs_by_line(folders: KeptFolders) -> list[Path]:
    names = (HOSPITAL_LOG, f"{HOSPITAL_LOG}.1", "audit.jsonl", f"{APPROVALS}/{HISTORY}")
    return [path for path in (folders.state / name for name in names) if path.is_file()]


def _old_lines(path: Path, days: float, now: float) -> Removal:
    lines = list(_lines(path, days, now))
    num_bytes = sum(len(line) for line, is_old in lines if is_old)
    oldest = next((moment for line, _ in lines if (moment := _moment(line)) is not None), now)
    return Removal(kind="log lines", path=path, num_bytes=num_bytes, age_days=(now - oldest) / _DAY_S)


def _lines(path: Path, days: float, now: float) -> Iterator[tuple[bytes, bool]]:
    """Each line, and whether it is too old; a line without a time belongs to the one before."""
    is_old = False
    for line in path.read_bytes().splitlines(keepends=True):
        if (moment := _moment(line)) is not None:
            is_old = now - moment > days * _DAY_S
        yield line, is_old


def _moment(line: bytes) -> float | None:
    """Unix seconds at which a line was written, None where it does not say."""
    text = line.decode("utf-8", errors="replace")
    try:
        if text.startswith("{"):
            content = json.loads(text)
            return float(content.get("time", content.get("at")))
        if text[:1].isdigit():
            return time.mktime(time.strptime(text[:19], "%Y-%m-%d %H:%M:%S"))
    except (ValueError, TypeError, OverflowError):
        return None
    return None


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _changed(path: Path) -> float:
    return path.lstat().st_mtime


def _is_old(changed: float, days: float, now: float) -> bool:
    return now - changed > days * _DAY_S


def _removal(kind: str, path: Path, now: float) -> Removal:
    parts = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    num_bytes = sum(part.lstat().st_size for part in parts if not part.is_dir())
    return Removal(kind=kind, path=path, num_bytes=num_bytes, age_days=(now - _changed(path)) / _DAY_S)
