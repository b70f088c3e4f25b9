"""Disks of a few megabytes, to be filled."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class SmallDisk:
    """A file system of its own at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Leave no byte."""
        with contextlib.suppress(OSError), (self.path / "filler").open("ab", buffering=0) as file:
            for piece in (2**16, 4096, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"x" * piece):
                        pass

    def free(self) -> None:
        """What a person does."""
        (self.path / "filler").unlink()


@contextlib.contextmanager
def small_disk(path: Path, *, megabytes: int) -> Iterator[SmallDisk]:
    """Put a small disk below what lies in the folder `path`; skipped where mounting is not permitted."""
    path.mkdir(parents=True, exist_ok=True)
    kept = path.with_name(path.name + ".kept")
    shutil.copytree(path, kept)
    options = f"size={megabytes}m,mode=0{path.stat().st_mode & 0o777:o}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"a small disk cannot be mounted here: {said.strip()}")
    try:
        shutil.copytree(kept, path, dirs_exist_ok=True)
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True, capture_output=True, timeout=20)
