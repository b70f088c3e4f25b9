"""Connections of the front: every state that one can be in ends by itself.

uvicorn bounds the silence after an answer only. Here a connection must send a whole request head soon, an
answer must come to an end, and where there is no room the one that has been silent longest makes it.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

FIRST_REQUEST_S = 15.0
"""From the TLS handshake to the end of the first request's head."""
IDLE_S = 75.0
"""From the end of one answer to the end of the next request's head; bytes without an end do not count."""
REQUEST_S = 300.0
"""For one request: its body, a hold, the SuperLink, and the answer on a slow link."""
HANDSHAKE_S = 10.0
"""For the TLS handshake; the event loop's default is 60 s."""


class BoundedConnection(H11Protocol):
    """h11 and not httptools: it bounds a request's head (16 KiB)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most, self.limit_concurrency = (
            self.limit_concurrency,
            None,
        )  # uvicorn would turn the new ones away
        self._serving: RequestResponseCycle | None = None
        self._has_asked = False
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The TLS handshake is over."""
        super().connection_made(transport)
        self._wait(FIRST_REQUEST_S)
        if self._most is not None and len(self.connections) > self._most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Bytes came; perhaps a request's head is whole now."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer was given; perhaps the next request is there already."""
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        serving = self.cycle if self.cycle is not None and not self.cycle.response_complete else None
        if serving is not self._serving:
            self._has_asked, self._serving = True, serving
            self._wait(IDLE_S if serving is None else REQUEST_S)

    def _wait(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._since = self.loop.time()
        self._timer = self.loop.call_later(seconds, self._time_is_up)

    def _time_is_up(self) -> None:
        if self._has_asked and self._serving is None:
            self.transport.close()  # what is left of the last answer may still go out
        else:
            self.transport.abort()

    def _make_room(self) -> None:
        """End the connection that has been silent longest, one that never asked anything before others."""
        silent = [
            other
            for other in self.connections
            if isinstance(other, BoundedConnection)
            and other is not self
            and other._serving is None
            and not other.transport.is_closing()
        ]
        first = min(silent, key=lambda other: (other._has_asked, other._since), default=self)
        first.transport.abort()
