"""Safe decoding: a file that is broken, too large or elsewhere becomes a reason, never a crash."""

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from client.images.records import SkipReason
from common.preprocessing import Preprocessing, upright

SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp"]
    + [".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"]
)
"""Names that announce an image; what a file is, its content says."""
# Named one by one: some of Pillow's other readers start programs (EPS) or are seldom tested.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
_MOST_BYTES_PER_PIXEL = 8  # RGBA of 16 bits


class Unusable(Exception):  # noqa: N818 - an answer about one image, caught by the reader
    """An image that is not used, and the reason."""

    def __init__(self, reason: SkipReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


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

    def locate(self, name: str) -> str:
        """Resolved path of the file `name` (from the root, or absolute inside it).

        Raises Unusable: ESCAPING where a link, `..` or an absolute path leads out, MISSING, EMPTY,
        UNREADABLE for what is no regular file.
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
            if status.st_size > max_pixels * _MOST_BYTES_PER_PIXEL + 2**20:
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


def decode(content: bytes, preprocessing: Preprocessing, *, max_pixels: int) -> DecodedImage:
    """Decode one file's bytes inside `guarded_pillow`. Raises Unusable, and nothing else."""
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:  # the header's size: nothing is decoded yet
                raise Unusable(SkipReason.OVERSIZED)
            # A JPEG's second picture (MPO) is a preview; other formats' further frames are pictures.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise Unusable(SkipReason.SEVERAL_FRAMES)
            image.load()
            plain = upright(image)
            return DecodedImage(preprocessing.fit(plain), pixels_digest(np.asarray(plain)))
    except Unusable:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Unusable(SkipReason.OVERSIZED) from None
    except UnidentifiedImageError:
        raise Unusable(SkipReason.UNREADABLE) from None
    # Damaged files make Pillow's parsers raise almost anything (struct.error, KeyError, zlib.error ...).
    except Exception as error:
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise Unusable(SkipReason.TRUNCATED if cut else SkipReason.UNREADABLE) from None
