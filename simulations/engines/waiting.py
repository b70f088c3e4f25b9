"""Messages that wait for a worker: each step costs the same however many hospitals wait.

jobs = WaitingJobs()
jobs.add(7, "hello")         # hospital 7
jobs.take(slot=0)            # "hello"; nobody else gets hospital 7 until
jobs.done(7)
"""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

J = TypeVar("J")


class WaitingJobs(Generic[J]):
    """Jobs by hospital, the oldest first; a hospital is with one slot at a time. Callers hold a lock."""

    def __init__(self) -> None:
        self._of_hospital: dict[int, deque[J]] = {}
        self._busy: set[int] = set()
        self._slot_of: dict[int, int] = {}
        """Where a hospital was served last: its images are in that worker's memory."""
        self._ready: dict[int | None, OrderedDict[int, None]] = {}
        """Hospitals with a job that nobody serves, by the slot that served them last."""

    def __len__(self) -> int:
        return sum(map(len, self._of_hospital.values()))

    def add(self, hospital: int, job: J) -> None:
        """Let `job` wait for its turn."""
        self._of_hospital.setdefault(hospital, deque()).append(job)
        self._note_ready(hospital)

    def take(self, slot: int) -> J | None:
        """A job for `slot`: of a hospital that it served last, of a new one, else of the fullest slot."""
        fullest = max(self._ready, key=lambda other: len(self._ready[other]), default=None)
        queue = next((self._ready[name] for name in (slot, None, fullest) if self._ready.get(name)), None)
        if queue is None:
            return None
        hospital, _ = queue.popitem(last=False)
        self._busy.add(hospital)
        self._slot_of[hospital] = slot
        jobs = self._of_hospital[hospital]
        job = jobs.popleft()
        if not jobs:
            del self._of_hospital[hospital]
        return job

    def done(self, hospital: int) -> None:
        """The hospital may get its next job."""
        self._busy.discard(hospital)
        self._note_ready(hospital)

    def clear(self) -> None:
        """Forget all jobs."""
        self._of_hospital.clear()
        self._ready.clear()

    def _note_ready(self, hospital: int) -> None:
        if hospital in self._of_hospital and hospital not in self._busy:
            self._ready.setdefault(self._slot_of.get(hospital), OrderedDict()).setdefault(hospital)
