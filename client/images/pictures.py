"""Everyday pictures (PNG, JPEG, TIFF ...) by Pillow, and by imagecodecs where Pillow would drop the depth."""

import io
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.images.content import Format, format_of
from client.images.records import SkipReason, Unusable, View
from common.intensities import Intensities
from common.preprocessing import Picture, deep, upright

# Named one by one: some of Pillow's other readers start programs (EPS) or are seldom tested.
_FORMATS: Final = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
_ORIENTATION: Final = 0x0112
_TIFF_BITS: Final = 258
_TURNS: Final[dict[int, Callable[[NDArray[Any]], NDArray[Any]]]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}


def read_picture(content: bytes, view: View, *, max_pixels: int) -> Picture:
    """One picture, upright. Raises Unusable, and whatever Pillow raises for damaged files."""
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        _check_size(image, max_pixels)
        # A JPEG's second picture (MPO) is a preview; other formats' further frames are pictures.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            if view.frame is None:
                raise Unusable(SkipReason.SEVERAL_FRAMES)
            image.seek(view.frame_of(frames))
            _check_size(image, max_pixels)
        if _is_deep_colour(image, content):
            return _deep_colour(content, image)
        image.load()
        return upright(image)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:  # the header's size: nothing is decoded yet
        raise Unusable(SkipReason.OVERSIZED)


def _is_deep_colour(image: Image.Image, content: bytes) -> bool:
    """Whether Pillow would cut 16-bit colours (or a 16-bit grey with transparency) to 8 bits."""
    if image.format == "PNG" and format_of(content[:16]) is Format.PNG:
        return content[24] == 16 and content[25] in (2, 4, 6)  # IHDR: bit depth, colour type
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, (1,))
        return len(bits) > 1 and max(bits) > 8
    return False


def _deep_colour(content: bytes, image: Image.Image) -> Intensities:
    import imagecodecs

    if image.format == "PNG":
        pixels = imagecodecs.png_decode(content)
    else:
        pixels = imagecodecs.tiff_decode(content, index=image.tell())
    if pixels.shape[:2] != (image.height, image.width) or pixels.ndim != 3 or pixels.dtype.kind not in "uf":
        raise Unusable(SkipReason.UNSUPPORTED)
    if pixels.shape[2] in (2, 4):
        pixels = _over_black(pixels)
    pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3]
    return deep(_TURNS.get(image.getexif().get(_ORIENTATION, 1), np.asarray)(pixels))


def _over_black(pixels: NDArray[Any]) -> NDArray[Any]:
    """Colours (H, W, 1 or 3) with the transparency in their last channel laid over black."""
    full = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
    share = pixels[..., -1:].astype(np.float64) / full
    return np.rint(pixels[..., :-1] * share).astype(pixels.dtype) if full > 1 else pixels[..., :-1] * share
