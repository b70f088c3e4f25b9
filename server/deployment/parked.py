"""Large bodies wait on the disk: a hospital with a slow link holds a file open, not memory."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

SMALL_BYTES = 64 * 2**10
"""A body up to this size stays in memory; all but the pieces of a model are smaller."""
_STRETCH = 64 * 2**10


class Parked:
    """Bytes in the order in which they came; a file without a name as soon as they are many."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._few = folder, bytearray()
        self._file: int | None = None
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def is_small(self) -> bool:
        """Whether it is no burden to have it in memory."""
        return self.size <= SMALL_BYTES

    def add(self, stretch: bytes) -> None:
        """Append. Raises OSError when the disk does not take it."""
        self._few += stretch
        self.size += len(stretch)
        if self.is_small:
            return
        if self._file is None:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                self._file = os.dup(file.fileno())
        with memoryview(self._few) as rest:
            written = 0
            while written < len(rest):
                written += os.write(self._file, rest[written:])
        self._few.clear()

    def content(self) -> bytes:
        """All of it, in memory."""
        return b"".join(self.stretches())

    def stretches(self) -> Iterator[bytes]:
        """All of it, a little at a time."""
        at = 0
        while self._file is not None and (stretch := os.pread(self._file, _STRETCH, at)):
            at += len(stretch)
            yield stretch
        if self._few:
            yield bytes(self._few)

    def shared(self) -> "Parked":
        """The same bytes, to be read and forgotten independently; nothing may be added to either."""
        other = Parked(self._folder)
        other._few, other.size = self._few, self.size
        other._file = None if self._file is None else os.dup(self._file)
        return other

    def close(self) -> None:
        """Forget it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class ParkedResponse(Response):
    """Sends what is parked in stretches, each when the one before is on its way; then forgets it."""

    def __init__(self, parked: Parked, status_code: int, headers: Mapping[str, str]) -> None:
        super().__init__(b"", status_code, {**headers, "content-length": str(parked.size)})
        self.parked = parked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send; uvicorn holds each stretch back while the connection's buffer is full."""
        with self.parked as parked:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            for stretch in parked.stretches():
                await send({"type": "http.response.body", "body": stretch, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
