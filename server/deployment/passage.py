"""How many pieces of a model are at the SuperLink at once, however many hospitals send or fetch one.

The SuperLink holds a piece about ten times while it handles it, in as many threads as there are calls. Only
the way to the SuperLink and back is narrow, on loopback; nobody in it waits for a hospital's own link.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.deployment.refused import Refused

AT_ONCE = 2
"""The SuperLink works on one at a time; the next one is on its way meanwhile."""
LONGEST_WAIT_S = 15.0
"""In the queue; a SuperNode waits 30 s for an answer, and comes again after a 503."""


class Passage:
    """First come, first served."""

    def __init__(self, at_once: int = AT_ONCE, *, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self._slots, self._longest_wait_s = asyncio.Semaphore(at_once), longest_wait_s

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one of the places until the block ends. Raises Refused 503 when none becomes free in time."""
        try:
            async with asyncio.timeout(self._longest_wait_s):
                await self._slots.acquire()
        except TimeoutError:
            raise Refused(503, "not now; ask again") from None
        try:
            yield
        finally:
            self._slots.release()
