"""Safe decoding: a file that is broken, too large or elsewhere becomes a reason, never a crash."""

import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.images.formats import most_bytes, open_picture
from client.images.records import WHOLE, SkipReason, Unusable, View
from common.preparation.problems import CannotPrepareError
from common.preprocessing import Picture, Preprocessing, eight_bits


class DecodedImage(NamedTuple):
    """One picture as the model sees it, and the fingerprint of the picture itself."""

    pixels: NDArray[np.uint8]
    """(channels, image_size, image_size)."""
    digest: str
    """SHA-256 of the upright full-size 8-bit pixels: the same for the same picture in any lossless format."""


class DataFolder:
    """The folder that images may lie in, and the only one."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self._resolved: dict[str, str] = {}  # folders recur; resolving each file's would cost most of a start

    def locate(self, name: str, *, folders: bool = False) -> str:
        """Resolved path of the file `name` (from the root, or absolute inside it), or also of a folder.

        Raises Unusable: ESCAPING where a link, `..` or an absolute path leads out, MISSING, EMPTY,
        UNREADABLE for what is neither a regular file nor, if `folders`, a folder.
        """
        if "\0" in name:
            raise Unusable(SkipReason.MISSING)
        parent, last = os.path.split(os.path.join(self.root, name))
        if parent not in self._resolved:
            self._resolved[parent] = os.path.realpath(parent)
        path = os.path.join(self._resolved[parent], last)
        if last in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        if not path.startswith(os.path.join(self.root, "")):
            raise Unusable(SkipReason.ESCAPING)
        try:
            status = os.stat(path)
        except OSError as error:
            gone = isinstance(error, FileNotFoundError | NotADirectoryError)
            raise Unusable(SkipReason.MISSING if gone else SkipReason.UNREADABLE) from None
        if folders and stat.S_ISDIR(status.st_mode):
            return path
        if not stat.S_ISREG(status.st_mode):
            raise Unusable(SkipReason.UNREADABLE)
        if status.st_size == 0:
            raise Unusable(SkipReason.EMPTY)
        return path


def read_content(path: str, *, max_pixels: int) -> bytes:
    """Bytes of a regular file; links are not followed and a pipe does not block. Raises Unusable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Unusable(SkipReason.UNREADABLE)
            if status.st_size > most_bytes(max_pixels):
                raise Unusable(SkipReason.OVERSIZED)
            content = file.read()
    except OSError as error:
        gone = isinstance(error, FileNotFoundError)
        raise Unusable(SkipReason.MISSING if gone else SkipReason.UNREADABLE) from None
    if not content:
        raise Unusable(SkipReason.EMPTY)
    return content


def content_digest(content: bytes) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()


def pixels_digest(pixels: NDArray[np.uint8]) -> str:
    """SHA-256 of a picture (H, W) or (H, W, 3)."""
    shape = "x".join(str(side) for side in pixels.shape)
    digest = hashlib.sha256(f"{shape}:".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


@contextmanager
def guarded_pillow(max_pixels: int) -> Iterator[None]:
    """Make Pillow refuse decompression bombs by our limit and print nothing about single files.

    Pillow's limit and the warning filters belong to the process: enter this once around all threads.
    """
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def decode(
    content: bytes, preprocessing: Preprocessing, *, max_pixels: int, view: View = WHOLE
) -> DecodedImage:
    """Decode one file's bytes inside `guarded_pillow`. Raises Unusable, and nothing else."""
    return fitted(open_picture(content, view, max_pixels=max_pixels), preprocessing)


def fitted(picture: Picture, preprocessing: Preprocessing) -> DecodedImage:
    """An upright picture as the model sees it. Raises Unusable."""
    return DecodedImage(fit(picture, preprocessing), pixels_digest(eight_bits(picture)))


def fit(picture: Picture, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The pixels alone. Raises Unusable where the picture cannot be brought to them."""
    try:
        return preprocessing.fit(picture)
    except CannotPrepareError as error:
        raise Unusable(SkipReason(error.problem.value)) from None
