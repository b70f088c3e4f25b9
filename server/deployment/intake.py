"""Taking in bodies: each bounded in size and time, all of them together bounded in memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from server.deployment.refused import Refused

MOST_BYTES = 256 * 2**20
"""Of all bodies that are being taken in or passed on."""


class Intake:
    """Counts what is held; one for the whole front."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most, self.held = most_bytes, 0

    @asynccontextmanager
    async def body(self, request: Request, *, limit: int, within_s: float) -> AsyncIterator[bytes]:
        """A request's body, counted as held until the block ends.

        Raises Refused 413 as soon as it is known to be over `limit` bytes and 503 when memory is short,
        ClientDisconnect when it has not come `within_s`.
        """
        stated = request.headers.get("content-length", "0")
        if not stated.isdecimal() or int(stated) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(within_s):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > limit:
                        raise _too_large(limit)
                    if self.held + len(chunk) > self._most:
                        raise Refused(503, "not now; ask again")
                    self.held += len(chunk)
                    body += chunk
            content = bytes(body)
            held, body = len(content), bytearray()
        except TimeoutError:
            self.held -= len(body)
            raise ClientDisconnect from None
        except BaseException:
            self.held -= len(body)
            raise
        try:
            yield content
        finally:
            self.held -= held


def _too_large(limit: int) -> Refused:
    return Refused(413, f"a request holds at most {limit} bytes")
