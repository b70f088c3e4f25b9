"""Lossless and 12-bit JPEG for pydicom, decoded by imagecodecs' libjpeg-turbo.

pydicom's own plugins for them are under the GPL or do not read 12 bits. The names below are those that
pydicom expects of a plugin.
"""

from typing import Final

import imagecodecs
from pydicom import uid
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import DecodeRunner

SYNTAXES: Final = (uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
DECODER_DEPENDENCIES: Final = {syntax: ("imagecodecs>=2025.3.30",) for syntax in SYNTAXES}
_LABEL: Final = "imagecodecs"


def is_available(syntax: str) -> bool:
    """Whether frames of this transfer syntax are decoded."""
    return syntax in SYNTAXES


def decode_frame(data: bytes, runner: DecodeRunner) -> bytes:
    """Samples of one frame as coded, colours not converted, in 8 or 16 bits each."""
    space = None if runner.samples_per_pixel == 1 else "RGB"
    samples = imagecodecs.jpeg8_decode(data, colorspace=space, outcolorspace=space)
    runner.set_option("bits_allocated", 8 * samples.dtype.itemsize)
    runner.set_option("planar_configuration", 0)
    return samples.tobytes()


for _syntax in SYNTAXES:
    if _LABEL not in get_decoder(_syntax).available_plugins:
        get_decoder(_syntax).add_plugin(_LABEL, (__name__, "decode_frame"))
