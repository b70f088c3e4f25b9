"""The cache of decoded images: decode once, afterwards map one file into memory.

An entry is a pair of files in `decoded-images` (mode 0700) under the hospital's cache folder, both 0600 and
named by one hash of content and preprocessing: `<key>.npy` holds the pixels, `<key>.json` what was decoded
and the SHA-256 of the `.npy`; without a `.json` that fits, an entry does not exist. No name of a file and no
patient id is in either. An entry whose images a newer one holds too is removed.
"""

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from client.images.records import SkipReason
from common.errors import DataError
from common.files import sha256_of_file, sync_folder, write_bytes_atomically
from common.preprocessing import Preprocessing

FOLDER: Final = "decoded-images"
_SCHEMA: Final = 1
_DECODERS: Final = ("Pillow", "pydicom", "pylibjpeg-openjpeg", "pyjpegls", "imagecodecs", "nibabel")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Decoded:
    """Outcome of decoding, one row per image asked for."""

    pixels: NDArray[np.uint8]
    """(rows, channels, size, size); zeros where an image failed."""
    digests: tuple[str, ...]
    """(rows,) fingerprint of each picture; empty where it failed."""
    failures: dict[int, SkipReason]
    """Why a row failed."""


class DecodeCache:
    """Entries for one preprocessing in one folder. Raises DataError where the folder cannot be used."""

    def __init__(self, folder: Path, preprocessing: Preprocessing, *, max_pixels: int) -> None:
        self.folder = folder / FOLDER
        # Another decoder or limit may give other pixels, so both belong to the key.
        self._how = {
            "schema": _SCHEMA,
            "preprocessing": preprocessing.of_pixels.to_dict(),
            "max_pixels": max_pixels,
            "decoder": _decoders(),
        }
        if preprocessing.libraries:
            self._how["libraries"] = preprocessing.libraries
        self._shape = (preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
        try:
            _make_private(folder, self.folder)
        except OSError as error:
            raise DataError(
                f"the cache folder {folder} cannot be used",
                why=str(error),
                fix="set site.cache to another one",
            ) from None

    def load(self, contents: Sequence[str]) -> Decoded | None:
        """The entry of exactly these file contents in this order, mapped read-only, or None."""
        key = self._key(contents)
        entry = self._read_entry(key)
        if entry is None or entry[0] != list(contents):
            return None
        with suppress(OSError):  # when it was used last, for `client.retention`
            os.utime(self.folder / f"{key}.json")
        return entry[1]

    def known(self, contents: Sequence[str]) -> Iterator[tuple[str, Decoded, int]]:
        """Where wanted contents stand in other entries: (content, entry, row), each content once."""
        missing = set(contents)
        for path in sorted(self.folder.glob("*.json")):
            if not missing:
                return
            entry = self._read_entry(path.stem)
            if entry is None:
                continue
            for row, content in enumerate(entry[0]):
                if content in missing:
                    missing.discard(content)
                    yield content, entry[1], row

    def allocate(self, rows: int) -> tuple[Path, NDArray[np.uint8]]:
        """A new private file to decode into, and its pixels (rows, channels, size, size) in memory."""
        path = self.folder / f"{secrets.token_hex(16)}.tmp"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(rows, *self._shape))
        return path, pixels

    def commit(self, path: Path, contents: Sequence[str], decoded: Decoded) -> None:
        """Make an allocated and filled file the entry of `contents`, whole or not at all."""
        key = self._key(contents)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        index = {
            **self._how,
            "contents": list(contents),
            "pictures": list(decoded.digests),
            "failures": {str(row): reason.value for row, reason in decoded.failures.items()},
            "sha256": sha256_of_file(path),
        }
        os.replace(path, self.folder / f"{key}.npy")
        sync_folder(self.folder)
        # The index comes last: it is what makes the entry exist.
        write_bytes_atomically(self.folder / f"{key}.json", json.dumps(index).encode(), mode=0o600)
        self._remove_covered(set(contents), keep=key)

    def _key(self, contents: Sequence[str]) -> str:
        material = json.dumps([self._how, list(contents)], sort_keys=True)
        return hashlib.sha256(material.encode()).hexdigest()

    def _read_entry(self, key: str) -> tuple[list[str], Decoded] | None:
        """Contents and outcome of an entry made in our way; a torn, altered or unreadable one is None."""
        array = self.folder / f"{key}.npy"
        index = self._read_index(key)
        if index is None:
            return None
        try:
            if index["sha256"] != sha256_of_file(array):
                return None
            pixels = np.load(array, mmap_mode="r", allow_pickle=False)
            failures = {int(row): SkipReason(reason) for row, reason in index["failures"].items()}
            contents, digests = list(index["contents"]), tuple(index["pictures"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if pixels.dtype != np.uint8 or pixels.shape != (len(contents), *self._shape):
            return None
        if len(digests) != len(contents):
            return None
        return contents, Decoded(pixels=pixels, digests=digests, failures=failures)

    def _read_index(self, key: str) -> dict[str, Any] | None:
        try:
            index = json.loads((self.folder / f"{key}.json").read_bytes())
        except (OSError, ValueError):
            return None
        ours = isinstance(index, dict) and all(index.get(name) == value for name, value in self._how.items())
        return index if ours else None

    def _remove_covered(self, contents: set[str], *, keep: str) -> None:
        for path in self.folder.glob("*.json"):
            index = None if path.stem == keep else self._read_index(path.stem)
            if index is not None and contents.issuperset(index.get("contents", ())):
                path.unlink(missing_ok=True)
                path.with_suffix(".npy").unlink(missing_ok=True)


def _decoders() -> str:
    """What turns files into pixels, with versions; read without importing any."""
    return ", ".join(f"{name} {version(name)}" for name in _DECODERS)


def _make_private(folder: Path, inner: Path) -> None:
    """Create both folders for the owner only; an `inner` that somebody else prepared is an OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    inner.mkdir(mode=0o700, exist_ok=True)
    status = os.lstat(inner)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{inner} is a link or belongs to somebody else")
    if stat.S_IMODE(status.st_mode) != 0o700:
        inner.chmod(0o700)
