"""A pool of worker processes: any idle one takes the next message, a dead one is replaced.

One thread per worker writes to its pipe and waits for the answer, so a worker that dies (SIGKILL, out of
memory) is noticed as an end of file at once. A hospital gets one message at a time, as a SuperNode would.
A message becomes bytes when its turn comes: a thousand of them that wait share one copy of the model.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from simulations.engines.processes import start_process, stop_process
from simulations.engines.waiting import WaitingJobs
from simulations.engines.worker import READY, WorkerSetup, serve

KILL_GRACE_S = 10.0
"""Seconds past its deadline after which a worker that still computes is killed and replaced."""
MOST_FAILED_STARTS = 3
"""Starts in a row without reaching its first message after which a slot gives up."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One message on its way to a hospital."""

    message_id: str
    node_id: int
    request: Callable[[], bytes]
    """Makes the bytes to send."""
    expires_at: float
    """Unix seconds: an answer after that is worth nothing."""


class Crash(Exception):  # noqa: N818 - an outcome of a job, handled where it is raised
    """The worker died, hung or closed its pipe while it had the message."""


@dataclass
class Worker:
    """A running worker process and our end of its pipe."""

    process: ForkServerProcess
    connection: Connection

    @classmethod
    def start(cls, setup: WorkerSetup, *, name: str) -> "Worker":
        """Fork a worker and wait until it can take a message; raises Crash when it cannot start."""
        try:
            process, connection = start_process(serve, (setup,), name=name)
        except (OSError, EOFError) as error:
            raise Crash(f"the worker process cannot be started: {type(error).__name__}") from None
        worker = cls(process, connection)
        try:
            ready = connection.recv_bytes()
        except (EOFError, OSError):
            ready = b""
        if ready != READY:
            worker.stop()
            raise Crash("the worker process ended while it started")
        return worker

    def ask(self, job: Job) -> bytes:
        """Send the message and wait for the reply; raises Crash."""
        try:
            self.connection.send_bytes(job.request())
            if not self.connection.poll(max(0.0, job.expires_at + KILL_GRACE_S - time.time())):
                raise Crash("the worker hangs")
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            raise Crash("the worker process died") from None

    def stop(self, *, patience_s: float = 2.0) -> None:
        """End the process."""
        stop_process(self.process, self.connection, patience_s=patience_s)


class WorkerPool:
    """Worker processes behind one queue; `on_reply(job, bytes or None)` is called from their threads."""

    def __init__(
        self,
        setup: WorkerSetup,
        *,
        num_workers: int,
        on_reply: Callable[[Job, bytes | None], None],
    ) -> None:
        self._setup = setup
        self._on_reply = on_reply
        self._jobs: WaitingJobs[Job] = WaitingJobs()
        self._changed = threading.Condition()
        self._closing = False
        self._workers: dict[int, Worker] = {}
        self.failed_slots = 0
        self.num_workers = num_workers
        self._threads = [
            threading.Thread(target=self._run_slot, args=(slot,), name=f"worker-{slot}", daemon=True)
            for slot in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the workers that are running now."""
        workers = list(self._workers.values())
        return [pid for worker in workers if (pid := worker.process.pid) is not None]

    @property
    def is_broken(self) -> bool:
        """Whether every slot has given up: no message will be answered any more."""
        return self.failed_slots == self.num_workers

    def submit(self, job: Job) -> None:
        """Queue a message."""
        with self._changed:
            self._jobs.add(job.node_id, job)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop all workers: at once, whatever they are doing."""
        with self._changed:
            self._closing = True
            self._jobs.clear()
            self._changed.notify_all()
        for worker in list(self._workers.values()):
            worker.process.kill()
        for thread in self._threads:
            thread.join(timeout=10)

    def _run_slot(self, slot: int) -> None:
        failed_starts = 0
        while not self._closing and failed_starts < MOST_FAILED_STARTS:
            try:
                worker = Worker.start(self._setup, name=f"hospital-worker-{slot}")
            except Crash:
                failed_starts += 1
                continue
            failed_starts = 0
            self._workers[slot] = worker
            self._serve_until_death(worker, slot)
            self._workers.pop(slot).stop(patience_s=2.0 if self._closing else 0.0)
        self.failed_slots += not self._closing

    def _serve_until_death(self, worker: Worker, slot: int) -> None:
        while (job := self._next_job(worker, slot)) is not None:
            reply: bytes | None = None
            try:
                reply = worker.ask(job)
            except Crash:
                return
            finally:
                self._finish(job, reply)

    def _next_job(self, worker: Worker, slot: int) -> Job | None:
        """The next message of a hospital that nobody serves now, first of those that this slot has served."""
        with self._changed:
            while not self._closing:
                if not worker.process.is_alive():
                    return None
                while (job := self._jobs.take(slot)) is not None:
                    if job.expires_at >= time.time():
                        return job
                    self._jobs.done(job.node_id)  # the grid has answered for it
                self._changed.wait(timeout=1.0)
        return None

    def _finish(self, job: Job, reply: bytes | None) -> None:
        with self._changed:
            self._jobs.done(job.node_id)
            self._changed.notify_all()
        if not self._closing:
            self._on_reply(job, reply)
