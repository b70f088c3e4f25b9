"""What one row of a hospital's data stands for: a file, a NIfTI pair of two, or a folder of DICOM slices."""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache

from client.images.content import HEAD_BYTES, Format, format_of, is_nifti_pair, unzipped
from client.images.decode import content_digest, read_content
from client.images.formats import count_frames, most_bytes, open_picture
from client.images.records import WHOLE, SkipReason, Unusable, View
from common.preprocessing import Picture

_PAIRED = {".hdr": ".img", ".img": ".hdr"}


class ContentChanged(Exception):  # noqa: N818 - what happened, not what failed
    """An entry's files are not what they were when they were hashed."""


def files_of(path: str) -> tuple[str, ...]:
    """The files of an entry: of a folder all visible ones in it, of a pair header and voxels.

    Raises Unusable for an empty folder.
    """
    if os.path.isdir(path):
        found = tuple(sorted(entry.path for entry in os.scandir(path) if _may_be_slice(entry)))
        if not found:
            raise Unusable(SkipReason.EMPTY)
        return found
    other = companion(path)
    if other is None:
        return (path,)
    return (path, other) if ".hdr" in os.path.basename(path).lower() else (other, path)


def companion(path: str) -> str | None:
    """The other file of a NIfTI pair beside `path`, named alike; None where there is none."""
    stem, suffix = os.path.splitext(path)
    zipped = ""
    if suffix.lower() == ".gz":
        stem, suffix, zipped = *os.path.splitext(stem), suffix
    wanted = _PAIRED.get(suffix.lower())
    if wanted is None:
        return None
    wanted = wanted.upper() if suffix.isupper() else wanted
    for ending in dict.fromkeys((zipped, "", ".gz")):
        if os.path.isfile(other := f"{stem}{wanted}{ending}"):
            return other
    return None


def format_name(path: str) -> str:
    """What an entry is, by its first bytes, in words; `unknown` for what cannot be read at all."""
    try:
        if os.path.isdir(path):
            return "DICOM series"
        file = files_of(path)[0]
        with open(file, "rb") as opened:
            head = opened.read(HEAD_BYTES)
    except (OSError, Unusable):
        return Format.UNKNOWN
    return str(format_of(head))


def entry_digest(path: str, digest: Callable[[str], str]) -> str:
    """Fingerprint of all content of an entry; of a single file `digest` of it. Raises Unusable."""
    files = files_of(path)
    if files == (path,):
        return digest(path)
    return _joint([digest(file) for file in files])


def read_entry(path: str, view: View, *, max_pixels: int, expected: str | None = None) -> Picture:
    """The picture of an entry, one file in memory at a time (two of a pair).

    Raises Unusable, and ContentChanged, before anything is decoded, where `entry_digest` is not `expected`.
    """
    files = files_of(path)
    if os.path.isdir(path):
        content, digest = _slice_content(files, view, max_pixels)
        _compare(digest, expected)
        return open_picture(content, WHOLE, max_pixels=max_pixels)
    contents = [read_content(file, max_pixels=max_pixels) for file in files]
    digests = [content_digest(content) for content in contents]
    _compare(digests[0] if files == (path,) else _joint(digests), expected)
    if len(files) == 2 and is_nifti_pair(unzipped(contents[0][:HEAD_BYTES])):
        return open_picture(contents[0], view, max_pixels=max_pixels, voxels=contents[1])
    return open_picture(contents[files.index(path)], view, max_pixels=max_pixels)


def entry_frames(path: str, *, max_pixels: int) -> int:
    """Pictures of an entry: slices of a series or volume, frames of a file. Raises Unusable."""
    files = files_of(path)
    if os.path.isdir(path):
        order = _order(tuple((file, _stamp(file)) for file in files), max_pixels)
        if isinstance(order, SkipReason):
            raise Unusable(order)
        return len(order[0])
    return count_frames(read_content(files[0], max_pixels=max_pixels), max_pixels=max_pixels)


def _compare(digest: str, expected: str | None) -> None:
    if expected is not None and digest != expected:
        raise ContentChanged


def _slice_content(files: Sequence[str], view: View, max_pixels: int) -> tuple[bytes, str]:
    """The chosen file of a series, and the digest of all of them."""
    order = _order(tuple((file, _stamp(file)) for file in files), max_pixels)
    if isinstance(order, SkipReason):
        raise Unusable(order)
    ordered, digests = order
    chosen = ordered[view.frame_of(len(ordered))]
    content = read_content(chosen, max_pixels=max_pixels)
    read = {**digests, chosen: content_digest(content)}
    return content, _joint([read[file] for file in files])


@lru_cache(maxsize=16)
def _order(
    files: tuple[tuple[str, tuple[int, ...]], ...], max_pixels: int
) -> tuple[list[str], dict[str, str]] | SkipReason:
    """Paths of a series in order, and the digest of each file; remembered while no file changes."""
    from client.images.dicom_file import parse_dicom
    from client.images.series import Slice, in_order, slice_of

    slices: list[Slice] = []
    digests: dict[str, str] = {}
    try:
        for file, _ in files:
            content = read_content(file, max_pixels=max_pixels)
            digests[file] = content_digest(content)
            if format_of(content[:HEAD_BYTES]) is Format.DICOM:
                parsed = parse_dicom(content, max_bytes=most_bytes(max_pixels))
                slices += filter(None, [slice_of(file, parsed)])
        return (in_order(slices), digests) if slices else SkipReason.NO_PIXELS
    except Unusable as unusable:
        return unusable.reason
    except Exception:  # as in `open_picture`
        return SkipReason.INCONSISTENT


def _stamp(file: str) -> tuple[int, ...]:
    try:
        status = os.lstat(file)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _joint(digests: Sequence[str]) -> str:
    return content_digest("\n".join(digests).encode())


def _may_be_slice(entry: os.DirEntry[str]) -> bool:
    """Links are not followed: they may lead anywhere."""
    return entry.is_file(follow_symlinks=False) and not entry.name.startswith(".")
