"""Memory of a server's processes, all added up: PSS, which counts what several share once. Linux only."""

import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_S, _LOOK_S = 0.05, 1.0
_PROC = Path("/proc")
_PSS = re.compile(rb"^Pss:\s+(\d+) kB", flags=re.MULTILINE)


@dataclass(kw_only=True)
class Memory:
    """PSS of a server's processes in bytes, sampled by a thread of its own."""

    root: int
    """Process id of the supervisor."""
    samples: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    """Unix seconds, and bytes by process."""
    _over: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Sample until `end`; new processes are looked for once a second."""
        kinds: dict[int, str] = {}
        look_at = 0.0
        while not self._over.wait(SAMPLE_S):
            if (now := time.time()) >= look_at:
                kinds, look_at = family(self.root), now + _LOOK_S
            self.samples.append((now, pss_of(kinds)))

    def end(self) -> None:
        """Sample no more."""
        self._over.set()

    @property
    def peak(self) -> dict[str, int]:
        """By process, at the moment when their sum was largest."""
        return max(
            (sample for _, sample in self.samples), key=lambda sample: sum(sample.values()), default={}
        )

    @property
    def each_peak(self) -> dict[str, int]:
        """The largest of each process, whenever that was."""
        names = {name for _, sample in self.samples for name in sample}
        return {name: max(sample.get(name, 0) for _, sample in self.samples) for name in sorted(names)}


def pss_of(kinds: Mapping[int, str]) -> dict[str, int]:
    """PSS in bytes of processes, by what they are; those of one kind are added up."""
    found: dict[str, int] = {}
    for pid, kind in kinds.items():
        try:
            match = _PSS.search((_PROC / str(pid) / "smaps_rollup").read_bytes())
        except OSError:  # it has ended meanwhile
            continue
        found[kind] = found.get(kind, 0) + (1024 * int(match.group(1)) if match else 0)
    return found


def family(root: int) -> dict[int, str]:
    """A process, all that it has started, and these in turn; what each of them is."""
    found, at = [root], 0
    while at < len(found):
        for task in (_PROC / str(found[at]) / "task").glob("*/children"):
            with suppress(OSError):
                found += [int(pid) for pid in task.read_text().split()]
        at += 1
    kinds = {}
    for pid in found:
        with suppress(OSError):
            kinds[pid] = _kind((_PROC / str(pid) / "cmdline").read_bytes())
    return kinds


def _kind(command: bytes) -> str:
    marks = {
        b"server_process": "server process",
        b"superlink": "superlink",
        b"front_process": "front",
        b"common.models": "initial weights",
    }
    return next((name for mark, name in marks.items() if mark in command), "supervisor")


def _sum(sample: Mapping[str, int]) -> int:
    return sum(sample.values())
