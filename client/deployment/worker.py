"""The worker process as its supervisor sees it: started, watched by what it says of its work, replaced."""

import time
from dataclasses import dataclass

from client.deployment.hospital_folder import HospitalFolder
from client.deployment.status import is_overdue
from client.deployment.work import Phase, Work, read_work, write_work
from common.child_process import ChildProcess
from common.flower_programs import flower_environment, python_module, without_proxy_on_loopback

_GRACE_S = 60.0
"""Beyond the policy's longest round before a worker counts as stuck."""
_PAUSES_S = (0.0, 1.0, 5.0, 15.0, 60.0)
_STEADY_S = 120.0


@dataclass(frozen=True, kw_only=True)
class News:
    """What a look has shown."""

    line: str = ""
    lost_a_task: bool = False
    """Whether the SuperNode waits for an answer that will not come."""


class Worker:
    """One worker after the other."""

    def __init__(self, folder: HospitalFolder) -> None:
        self._work_file = folder.work_file
        self._longest_s = folder.config.policy.maximum_round_s + _GRACE_S
        self._log = folder.logs / "worker.log"
        self._process = ChildProcess(
            python_module("client.deployment.worker_process", str(folder.path)),
            log=self._log,
            env=without_proxy_on_loopback(flower_environment(folder.flower_home)),
            name="worker",
        )
        self.work = Work()
        self._lost = 0
        self._started = 0.0
        self._start_at: float | None = None
        self._short_lives = 0

    @property
    def pid(self) -> int:
        """Process id of the last one."""
        return self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether it lives and has imported all it needs."""
        return self._process.is_running and self.work.phase is not Phase.STARTING

    def start(self) -> None:
        """Start the first one, or the next, which goes on counting."""
        self.work = read_work(self._work_file).at(Phase.STARTING, pid=0)
        write_work(self._work_file, self.work)
        self._lost, self._start_at = self.work.lost, None
        self._process.start()
        self._started = time.monotonic()

    def look(self) -> News:
        """Replace it when it has ended or is stuck."""
        if self._start_at is not None:
            if time.monotonic() >= self._start_at:
                self.start()
            return News()
        self.work = read_work(self._work_file)
        if is_overdue(self.work, longest_s=self._longest_s):
            self._process.kill()
        if not self._process.is_running:
            return self._ended()
        if self.work.lost > self._lost:
            self._lost = self.work.lost
            return News(line=f"the worker lost a task (see {self._log})", lost_a_task=True)
        return News()

    def stop(self) -> None:
        """End it; the ledger and the outbox are safe at every moment."""
        self._process.stop(patience_s=3.0)

    def _ended(self) -> News:
        self.work = read_work(self._work_file)
        was_busy = self.work.phase is Phase.BUSY
        lived_s = time.monotonic() - self._started
        self._short_lives = 0 if lived_s > _STEADY_S else self._short_lives + 1
        pause = _PAUSES_S[min(self._short_lives - 1, len(_PAUSES_S) - 1)] if self._short_lives else 0.0
        self._start_at = time.monotonic() + pause
        self.work = self.work.at(Phase.STARTING)
        what = "in a task" if was_busy else "between tasks"
        return News(
            line=f"the worker has ended {what} (status {self._process.poll()}, see {self._log}); "
            f"a new one starts",
            lost_a_task=was_busy,
        )
