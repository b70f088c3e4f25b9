"""Waiting for a bell inside an event loop: one look for all who wait, none when nobody does."""

import asyncio
from typing import Any

from server.deployment.bell import Bell

_LOOK_EVERY_S = 0.03


class Listening:
    """Wakes everybody who waits, at most 0.03 s after the bell."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._waiting = 0
        self._rang = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def tone(self) -> int:
        """See `Bell.tone`."""
        return self._bell.tone

    async def wait(self, tone: int, timeout_s: float, gone: "asyncio.Future[None]") -> None:
        """Return when the bell has rung since `tone`, when time is over, or when `gone` is done."""
        if self._bell.tone != tone:
            return
        self._waiting += 1
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch(tone))
        rang = asyncio.ensure_future(self._rang.wait())
        try:
            both: set[asyncio.Future[Any]] = {rang, gone}
            await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            rang.cancel()
            self._waiting -= 1

    async def _watch(self, heard: int) -> None:
        while self._waiting:
            if (tone := self._bell.tone) != heard:
                heard = tone
                ringing, self._rang = self._rang, asyncio.Event()
                ringing.set()
            await asyncio.sleep(_LOOK_EVERY_S)
