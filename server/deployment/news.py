"""What the front sees of replies, for the server process: one appends lines, the other reads them."""

import os
import re
from enum import StrEnum
from pathlib import Path

from common.files import append_line

BELL, NEWS = "bell", "replies"
"""Files in the state folder: the server process rings the one and reads the other."""
_LINE = re.compile(r"(begun|whole|lost) ([0-9a-f]{1,128})")


class Kind(StrEnum):
    """What became of a message."""

    BEGUN = "begun"
    """Its reply is being sent; asking for it now would wait in Flower's back-off."""
    WHOLE = "whole"
    """Its reply is all there."""
    LOST = "lost"
    """The hospital had it, and has started anew without it."""


class News:
    """The file; each reader keeps its own place in it."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def tell(self, kind: Kind, message_id: str) -> None:
        """Append a line."""
        append_line(self._path, f"{kind.value} {message_id}")

    def fresh(self) -> list[tuple[Kind, str]]:
        """Whole lines since the last call; costs one look at the file's size when there are none."""
        try:
            size = os.stat(self._path).st_size
        except FileNotFoundError:
            size = 0
        if size == self._read:
            return []
        start = self._read if size > self._read else 0  # a new session has begun the file anew
        if size == 0:
            self._read = 0
            return []
        with self._path.open("rb") as file:
            file.seek(start)
            text = file.read(size - start)
        whole = text[: text.rfind(b"\n") + 1]
        self._read = start + len(whole)
        found = (_LINE.fullmatch(line) for line in whole.decode(errors="replace").splitlines())
        return [(Kind(match[1]), match[2]) for match in found if match]
