"""The size that a coded picture states itself, read without decoding it."""

import struct
from typing import Final

_WITHOUT_LENGTH: Final = {0x01, *range(0xD0, 0xDA)}
_SIZES: Final = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_JP2: Final = b"\0\0\0\x0cjP  "


def bare_codestream(data: bytes) -> bytes | None:
    """A JPEG 2000 codestream without the boxes of a JP2 file around it, other bytes as they are.

    None where the boxes lead nowhere; a parser that follows them might not come back.
    """
    if not data.startswith(_JP2):
        return data
    place = 0
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">L", data, place)
        if data[place + 4 : place + 8] == b"jp2c":
            return data[place + 8 :]
        if length < 8:
            return None
        place += length
    return None


def codestream_size(data: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, samples) of JPEG, JPEG-LS or bare JPEG 2000 bytes; None where nothing is stated."""
    if data[:2] == b"\xff\xd8":
        return _jpeg_size(data)
    if data[:4] != b"\xff\x4f\xff\x51" or len(data) < 42:
        return None
    width, height, left, top = struct.unpack_from(">4L", data, 8)
    return height - top, width - left, int.from_bytes(data[40:42], "big")


def _jpeg_size(data: bytes) -> tuple[int, int, int] | None:
    place = 2
    while place + 10 <= len(data):
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker in _SIZES:
            rows, columns, samples = struct.unpack_from(">HHB", data, place + 5)
            return rows, columns, samples
        if marker == 0xFF:
            place += 1
        elif marker in _WITHOUT_LENGTH:
            place += 2
        else:
            place += 2 + struct.unpack_from(">H", data, place + 2)[0]
    return None
