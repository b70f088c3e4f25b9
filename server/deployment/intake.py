"""Taking in bodies: each bounded in size and time, all of them together bounded on the disk."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.requests import ClientDisconnect, Request

from server.deployment.parked import Parked
from server.deployment.refused import Refused

MOST_BYTES = 4 * 2**30
"""Of all bodies that are being taken in or passed on; all but the small ones are on the disk."""


class Intake:
    """Counts what is held; one for the whole front."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self._folder, self._most, self.held = folder, most_bytes, 0

    @asynccontextmanager
    async def body(self, request: Request, *, limit: int, within_s: float) -> AsyncIterator[Parked]:
        """A request's body, counted as held until the block ends.

        Raises Refused 413 as soon as it is known to be over `limit` bytes and 503 when there is no room,
        ClientDisconnect when it has not come `within_s`.
        """
        stated = request.headers.get("content-length", "0")
        if not stated.isdecimal() or int(stated) > limit:
            raise _too_large(limit)
        with Parked(self._folder) as body:
            try:
                await self._take_in(request, body, limit=limit, within_s=within_s)
                yield body
            finally:
                self.held -= body.size

    async def _take_in(self, request: Request, body: Parked, *, limit: int, within_s: float) -> None:
        try:
            async with asyncio.timeout(within_s):
                async for stretch in request.stream():
                    if body.size + len(stretch) > limit:
                        raise _too_large(limit)
                    if self.held + len(stretch) > self._most:
                        raise Refused(503, "not now; ask again")
                    body.add(stretch)
                    self.held += len(stretch)
        except TimeoutError:
            raise ClientDisconnect from None


def _too_large(limit: int) -> Refused:
    return Refused(413, f"a request holds at most {limit} bytes")
