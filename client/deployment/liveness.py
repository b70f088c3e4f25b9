"""Whether the worker gets on, by the supervisor's own clock: what it says of itself, and that it says it."""

from client.deployment.work import Phase, Work

BEAT_S = 2.0
"""Between two beats of a worker that looks for tasks; one look takes up to 30 s where a SuperNode hangs."""
_SILENT_S, _LATE_S = 60.0, 40.0
_STARTS_WITHIN_S = 900.0
"""Importing torch from a slow disk takes minutes."""


class Liveness:
    """Remembers since when the worker has been where it is; times are `time.monotonic` seconds."""

    def __init__(self, *, longest_task_s: float) -> None:
        self._longest_task_s = longest_task_s
        self._place: tuple[Phase, float] | None = None
        self._phase = Phase.STARTING
        self._beat: int | None = None
        self._since = self._beat_at = 0.0

    def started(self, now: float) -> None:
        """A new worker was started."""
        self._place, self._phase = None, Phase.STARTING
        self._since = self._beat_at = now

    def see(self, work: Work, beat: int | None, *, now: float) -> None:
        """What a look has shown."""
        if (work.phase, work.since) != self._place:
            self._place, self._phase = (work.phase, work.since), work.phase
            self._since = self._beat_at = now
        if beat != self._beat:
            self._beat, self._beat_at = beat, now

    def excuse(self, now: float) -> None:
        """Its silence says nothing: the disk takes nothing."""
        self._since = self._beat_at = now

    def is_late(self, now: float) -> bool:
        """Whether a worker without work has been silent for longer than it should."""
        return self._phase is Phase.IDLE and now - self._beat_at > _LATE_S

    def hangs(self, now: float) -> str:
        """In words how long it has shown no progress; empty as long as that is no reason to replace it."""
        at_it_s = now - (self._beat_at if self._phase is Phase.IDLE else self._since)
        limits = {Phase.IDLE: _SILENT_S, Phase.STARTING: _STARTS_WITHIN_S, Phase.BUSY: self._longest_task_s}
        doing = {Phase.IDLE: "silent", Phase.STARTING: "starting", Phase.BUSY: "at one task"}
        return f"{doing[self._phase]} for {at_it_s:.0f} s" if at_it_s > limits[self._phase] else ""
