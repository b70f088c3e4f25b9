"""A program that belongs to this one: output in a log file, ended with ours, stopped as a whole group."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LARGEST_LOG = 10 * 2**20
_KERNEL_S = 10.0


class ChildProcess:
    """Start it from the main thread: Linux ends it with SIGTERM when the thread that started it is gone."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        name: str = "",
    ) -> None:
        self.command, self.log, self.name = list(command), log, name or Path(command[0]).name
        self._env = dict(os.environ if env is None else env)
        self._process: subprocess.Popen[bytes] | None = None
        self._was_stopped = False

    def start(self) -> None:
        """Start it; a log above 10 MB is kept as `.1` and begun anew."""
        if self.poll() is None and self._process is not None:
            raise ValueError(f"{self.name} runs already")
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("a child of another thread than the main one would end with that thread")
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.bound_log()
        self._was_stopped = False
        with self.log.open("ab") as log:
            os.fchmod(log.fileno(), 0o600)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "common.child_process", str(os.getpid()), *self.command],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def bound_log(self) -> None:
        """Keep a log above 10 MB as `.1` and begin it anew, also while it is written."""
        try:
            if self.log.stat().st_size <= _LARGEST_LOG:
                return
        except OSError:
            return
        # Copied and cut, not renamed: the child appends to the file that it has open.
        kept = self.log.with_name(self.log.name + ".1")
        with contextlib.suppress(OSError):
            shutil.copyfile(self.log, kept)
            kept.chmod(0o600)
        with contextlib.suppress(OSError):
            os.truncate(self.log, 0)

    @property
    def pid(self) -> int:
        """Process id; ValueError before the start."""
        if self._process is None:
            raise ValueError(f"{self.name} has not been started")
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status, None while it runs; also None before the start."""
        return None if self._process is None else self._process.poll()

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def ask_to_end(self) -> None:
        """SIGTERM to the whole group, without waiting."""
        if self.is_running:
            self._signal(signal.SIGTERM)

    def stop(self, patience_s: float = 10.0) -> None:
        """SIGTERM to the whole group, SIGKILL after `patience_s`.

        Also after its own end, once: members of its group may be left. Later its number may be another's.
        """
        if self._process is None or self._was_stopped:
            return
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel, on a dead disk perhaps
            self._process.wait(_KERNEL_S)
            self._was_stopped = True

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        self.stop(patience_s=0.0)

    def last_lines(self, count: int = 20) -> list[str]:
        """The end of its log."""
        if not self.log.exists():
            return []
        with self.log.open(errors="replace") as log:
            return [line.rstrip("\n") for line in deque(log, maxlen=count)]

    def _signal(self, number: int) -> None:
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def main() -> None:
    """Ask the kernel for SIGTERM at the parent's death, then become the program given.

    Arguments: the parent's process id, and the command line of the program.
    """
    parent = int(sys.argv[1])
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was asked
        raise SystemExit(1)
    # Ctrl-C is for the command that started this, which ends things in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
