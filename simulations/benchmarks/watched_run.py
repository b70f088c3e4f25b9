"""One run of `flower-simulate run` in processes of its own, watched from outside: times and memory."""

import json
import os
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import FederationError
from common.flower_programs import python_module

_MARK = "HOSPITAL_FEDERATION_WATCHED"
"""Environment variable that all processes of a watched run inherit."""
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class WatchedRun:
    """What a run took; times are seconds from the command on."""

    result: Mapping[str, Any]
    """result.json."""
    wall_s: float
    first_training_s: float
    first_sent_s: float
    closed_s: tuple[float, ...]
    """When each round closed."""
    hospital_rounds: int
    """Updates in the model."""
    peak_bytes: int | None
    """Most memory of all processes together, shared pages counted once; None where nobody looked."""
    processes: int | None
    """How many there were then."""

    @property
    def seconds_per_hospital_round(self) -> float:
        """From the first message of round 1 to the close of the last one, over all updates."""
        return (self.closed_s[-1] - self.first_sent_s) / self.hospital_rounds


def watch_run(flags: Mapping[str, object], *, timeout_s: float, memory: bool = False) -> WatchedRun:
    """Run a scenario; `flags` by their names in `flower-simulate run`, without dashes.

    Raises FederationError with the command's last words when it does not complete.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        texts = [
            text for name, value in {**flags, "out": folder}.items() for text in (f"--{name}", str(value))
        ]
        command = python_module("simulations.cli", "run", *texts, "--format", "json")
        mark = secrets.token_hex(8)
        began = time.time()
        with (Path(parent) / "words").open("w+b") as words, _Watch(mark, wanted=memory) as watch:
            status = _finished(command, words.fileno(), parent, mark, timeout_s)
            wall_s = time.time() - began
            words.seek(0)
            said = words.read().decode(errors="replace")
        if status != 0:
            raise FederationError("the run to measure did not complete", why=said.strip()[-500:])
        result = json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    asked = [line for line in lines if "hospital" in line]
    started = [line["training_started"] for line in asked if line["training_started"] is not None]
    return WatchedRun(
        result=result,
        wall_s=wall_s,
        first_training_s=min(started) - began,
        first_sent_s=min(line["sent"] for line in asked) - began,
        closed_s=tuple(line["closed"] - began for line in lines if "closed" in line),
        hospital_rounds=sum(line["outcome"] == "aggregated" for line in asked),
        peak_bytes=watch.peak_bytes if memory else None,
        processes=watch.processes if memory else None,
    )


def _finished(command: list[str], words: int, folder: str, mark: str, timeout_s: float) -> int:
    """Exit status of the command; after `timeout_s` it is asked to end, then killed."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=words, cwd=folder, env={**os.environ, _MARK: mark}
    ) as process:
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            # The first asks for an orderly stop, the second ends at once; Flower's processes go with it.
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(2.0)
            raise FederationError(
                f"the run to measure took more than {timeout_s:g} seconds", fix="measure a smaller one"
            ) from None
        finally:
            process.kill()


class _Watch(threading.Thread):
    """Adds up the memory of all processes that carry a mark, again and again."""

    def __init__(self, mark: str, *, wanted: bool) -> None:
        super().__init__(name="watch", daemon=True)
        self.peak_bytes, self.processes = 0, 0
        self._mark, self._wanted = f"{_MARK}={mark}".encode(), wanted
        self._ended = threading.Event()

    def __enter__(self) -> "_Watch":
        if self._wanted:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            sizes = [size for folder in Path("/proc").iterdir() if (size := self._size(folder))]
            if sum(sizes) > self.peak_bytes:
                self.peak_bytes, self.processes = sum(sizes), len(sizes)

    def _size(self, folder: Path) -> int:
        """Proportional set size of one marked process in bytes: a page that n share counts as 1 / n."""
        if not folder.name.isdecimal():
            return 0
        try:
            if self._mark not in (folder / "environ").read_bytes().split(b"\0"):
                return 0
            lines = (folder / "smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended, or is another user's
            return 0
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


@contextmanager
def generated_images(hospitals: int, *, images: int, test_images: int = 500) -> Iterator[Path]:
    """A `.npz` of generated films without patients: `images` for each hospital, and a test split."""
    import numpy as np

    from client.images.phantoms import PhantomSet, hospital_phantoms

    wanted, drawn = hospitals * images + test_images, 0
    parts: list[PhantomSet] = []
    while drawn < wanted:
        parts.append(hospital_phantoms(hospital=len(parts), num_patients=500, image_size=28, seed=0))
        drawn += len(parts[-1].images)
    pixels = np.concatenate([part.images for part in parts])[:wanted]
    labels = np.concatenate([part.labels for part in parts])[:wanted]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "films.npz"
        arrays = {"train": slice(test_images, None), "test": slice(0, test_images)}
        content = {f"{name}_images": pixels[rows] for name, rows in arrays.items()}
        content |= {f"{name}_labels": labels[rows] for name, rows in arrays.items()}
        np.savez(path, **content)  # type: ignore[arg-type]
        yield path
