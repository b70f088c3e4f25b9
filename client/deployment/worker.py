"""The worker process as its supervisor sees it: started, watched by what it says of its work, replaced."""

import time
from contextlib import suppress
from dataclasses import dataclass, replace

from client.deployment.hospital_folder import HospitalFolder
from client.deployment.liveness import Liveness
from client.deployment.work import Phase, Work, last_beat, read_work, write_work
from common.child_process import ChildProcess
from common.flower_programs import flower_environment, python_module, without_proxy_on_loopback

_GRACE_S = 60.0
"""Beyond the policy's longest round before a worker counts as stuck."""
_PAUSES_S = (0.0, 1.0, 5.0, 15.0, 60.0)
_STEADY_S = 120.0
_DISK_S = 10.0


@dataclass(frozen=True, kw_only=True)
class News:
    """What a look has shown."""

    line: str = ""
    lost_a_task: bool = False
    """Whether the SuperNode waits for an answer that will not come."""


class WorkerProcess:
    """One worker after the other."""

    def __init__(self, folder: HospitalFolder) -> None:
        self._work_file = folder.work_file
        self._life = Liveness(longest_task_s=folder.config.policy.maximum_round_s + _GRACE_S)
        self._log = folder.logs / "worker.log"
        self._process = ChildProcess(
            python_module("client.deployment.worker_process", str(folder.path)),
            log=self._log,
            env=without_proxy_on_loopback(flower_environment(folder.flower_home)),
            name="worker",
        )
        self.work = Work()
        self.was_started = False
        self._lost = 0
        self._started = self._started_at = 0.0
        self._start_at: float | None = None
        self._short_lives = 0
        self._refused = ""

    @property
    def pid(self) -> int:
        """Process id of the last one."""
        return self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether it lives, has imported all it needs, and gets on."""
        has_begun = self._process.is_running and self.work.phase is not Phase.STARTING
        return has_begun and not self._life.is_late(time.monotonic())

    @property
    def is_idle(self) -> bool:
        """Whether it is ready and has no task."""
        return self.is_ready and self.work.phase is Phase.IDLE

    def start(self) -> News:
        """Start the first one, or the next, which goes on counting; a disk that refuses is tried again."""
        self._started, self._started_at, self.was_started = time.monotonic(), time.time(), True
        self.work = read_work(self._work_file).at(Phase.STARTING, pid=0)
        self._lost, self._start_at = self.work.lost, None
        self._life.started(self._started)
        with suppress(OSError):  # it says so itself
            write_work(self._work_file, self.work)
        try:
            self._process.start()
        except OSError as error:
            self._start_at = self._started + _DISK_S
            before, self._refused = self._refused, f"the worker cannot be started: {error}"
            return News(line="" if before == self._refused else self._refused)
        self._refused = ""
        return News()

    def look(self) -> News:
        """Replace it when it has ended or hangs."""
        now = time.monotonic()
        self._process.bound_log()
        if self._start_at is not None:
            return self.start() if now >= self._start_at else News()
        self.work = self._told()
        self._life.see(self.work, last_beat(self._work_file), now=now)
        hangs = self._life.hangs(now)
        if hangs and self.work.phase is not Phase.BUSY and not self._takes_notes():
            self._life.excuse(now)
        elif hangs:
            self._process.kill()
        if not self._process.is_running:
            return self._ended(hangs)
        if self.work.lost > self._lost:
            self._lost = self.work.lost
            return News(line=f"the worker lost a task (see {self._log})", lost_a_task=True)
        return News()

    def stop(self) -> None:
        """End it; the ledger and the outbox are safe at every moment."""
        self._process.stop(patience_s=3.0)

    def _told(self) -> Work:
        """Its own words; what an earlier one has left on a disk that takes nothing more are not its."""
        work = read_work(self._work_file)
        if work.pid != self._process.pid:
            return replace(work, phase=Phase.STARTING, since=self._started_at)
        return work

    def _takes_notes(self) -> bool:
        """Whether the disk takes what a worker writes of itself; a silent one may have tried in vain."""
        probe = self._work_file.with_name("work.probe")
        try:
            write_work(probe, self.work)
            probe.unlink()
        except OSError:
            return False
        return True

    def _ended(self, hangs: str) -> News:
        self.work = self._told()
        was_busy = self.work.phase is Phase.BUSY
        lived_s = time.monotonic() - self._started
        self._short_lives = 0 if lived_s > _STEADY_S else self._short_lives + 1
        pause = _PAUSES_S[min(self._short_lives - 1, len(_PAUSES_S) - 1)] if self._short_lives else 0.0
        self._start_at = time.monotonic() + pause
        self.work = self.work.at(Phase.STARTING)
        what = "in a task" if was_busy else "between tasks"
        how = f"was ended, {hangs}" if hangs else f"has ended {what} (status {self._process.poll()})"
        return News(
            line=f"the worker {how}, see {self._log}; a new one starts",
            lost_a_task=was_busy,
        )
