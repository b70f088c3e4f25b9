"""A network of its own for one hospital: a namespace and a wire to this machine that can be pulled out."""

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator

import pytest

_NUMBERS = itertools.count(os.getpid() % 200 * 64)


class Wire:
    """The two ends of a veth pair: `here` at the server, the other inside the namespace."""

    def __init__(self, number: int) -> None:
        self.namespace, self._here, self._there = f"hf{number}", f"hfa{number}", f"hfb{number}"
        base = f"10.{200 + number // 16384 % 50}.{number // 64 % 256}.{number % 64 * 4}"
        start, _, last = base.rpartition(".")
        self.here, self._inside = f"{start}.{int(last) + 1}", f"{start}.{int(last) + 2}"
        """Address of this machine as the hospital sees it."""

    @property
    def prefix(self) -> list[str]:
        """What to put before a command that shall run at the hospital's end."""
        return ["ip", "netns", "exec", self.namespace]

    def plug(self) -> None:
        """The wire works."""
        _ip("link", "set", self._here, "up")

    def pull(self) -> None:
        """Nothing passes; what was under way is lost, connections hear nothing of it."""
        _ip("link", "set", self._here, "down")

    def lay(self) -> None:
        """Make the namespace and the wire."""
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self.namespace)
        _ip("address", "add", f"{self.here}/30", "dev", self._here)
        inside = ("-n", self.namespace)
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "address", "add", f"{self._inside}/30", "dev", self._there)
        _ip(*inside, "link", "set", self._there, "up")
        self.plug()

    def remove(self) -> None:
        """Take both away."""
        for arguments in (("link", "delete", self._here), ("netns", "delete", self.namespace)):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*arguments)


@contextlib.contextmanager
def wires(count: int) -> Iterator[list[Wire]]:
    """As many as asked for; the test is skipped where this machine does not permit them."""
    made: list[Wire] = []
    try:
        for _ in range(count):
            made.append(Wire(next(_NUMBERS)))
            try:
                made[-1].lay()
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", "") or str(error)
                pytest.skip(f"network namespaces are not permitted here: {said.strip()}")
        yield made
    finally:
        for wire in made:
            wire.remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)
