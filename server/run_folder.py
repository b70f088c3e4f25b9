"""The folder of one run: its lock, its metrics, and how a person asks it to stop."""

import fcntl
import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.config import FederationConfig
from common.errors import ConfigError, FederationError
from common.files import append_line, write_bytes_atomically
from common.settings import to_toml

CONFIG, METRICS, RESULT = "config.toml", "metrics.jsonl", "result.json"
MODEL, MODEL_DESCRIPTION, MODEL_CARD = "model.safetensors", "model.json", "MODEL_CARD.md"
CERTIFICATES = "certificates"
"""Folder of the hospitals' signed release certificates, `<name>.json`."""
STOP, ATTEMPT, SPENT = "stop", "attempt", "spent.json"
_OWN_NAME = re.compile(r".+-\d{8}-\d{6}-[0-9a-f]{8}")
"""A folder that is named by `new_run_id`: the run in it has that id."""


class RunFolder:
    """Paths and small files of one run; `open_run_folder` gives it, locked."""

    def __init__(self, path: Path, *, new_run_id: str) -> None:
        self.path = path
        self.new_run_id = new_run_id
        """Id for a run that starts here; a resumed one keeps its own."""
        self.checkpoints = path / "checkpoints"
        self.spool = path / "spool"
        self.spent = path / SPENT

    @property
    def stop_requested(self) -> bool:
        """Whether a person has put the file `stop` there."""
        return (self.path / STOP).exists()

    def forget_stop(self) -> None:
        """Take the file `stop` away, so that the run can be resumed."""
        (self.path / STOP).unlink(missing_ok=True)

    def attempt(self) -> int:
        """Which attempt rounds are asked in: the number in the file `attempt`, 1 without it.

        An operator raises it to have rounds trained anew whose answers were lost; hospitals charge it again.
        """
        path = self.path / ATTEMPT
        try:
            number = int(path.read_text()) if path.exists() else 1
        except ValueError:
            number = 0
        if number < 1:
            raise ConfigError(f"{path} holds no attempt number", fix="write 1, or 2 to train rounds anew")
        return number

    def keep_config(self, config: FederationConfig) -> None:
        """Write config.toml: every setting as it is used, defaults included."""
        write_bytes_atomically(self.path / CONFIG, to_toml(config).encode())

    def record(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines to metrics.jsonl, all of a round in one durable write."""
        text = "\n".join(json.dumps(line, allow_nan=False) for line in lines)
        append_line(self.path / METRICS, text, durable=True)

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a torn one is left out."""
        path = self.path / METRICS
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return [line for text in lines if (line := _metric(text)) is not None]

    def forget_rounds_after(self, round_number: int) -> None:
        """Drop the lines of rounds that no checkpoint holds: they are trained, and written, again."""
        kept = [json.dumps(line) for line in self.metrics() if line["round"] <= round_number]
        text = "".join(line + "\n" for line in kept)
        write_bytes_atomically(self.path / METRICS, text.encode())


@contextmanager
def open_run_folder(config: FederationConfig) -> Iterator[RunFolder]:
    """Make or reopen the folder of the run and hold its lock. Raises FederationError when it is in use."""
    run_id = new_run_id(config.federation.name)
    path = Path(config.runtime.run_folder) if config.runtime.run_folder else Path("runs") / run_id
    if _OWN_NAME.fullmatch(path.name) and path.name.startswith(f"{config.federation.name}-"):
        run_id = path.name
    path.mkdir(parents=True, exist_ok=True)
    # A record lock, not flock: worker processes forked later must not keep it when this server is killed.
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FederationError(
                f"the run folder {path} is in use",
                why="another server is writing it",
                fix="wait for it, stop it, or choose another folder",
            ) from None
        yield RunFolder(path, new_run_id=run_id)


def new_run_id(federation: str) -> str:
    """Name, time and chance: hospitals keep answers by it, so two runs must never share one."""
    return f"{federation}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def _metric(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("round"), int) else None
