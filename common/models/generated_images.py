"""Generated pictures of noise, the same on every machine: what scattering features are standardised with.

Their spectrum falls as that of photographs and films does, amplitude 1 / frequency, and nothing else of them
is like a patient. They take the place of training images wherever a method wants statistics of some, so that
nothing has to be protected. Source of the spectrum: Field 1987, Relations between the statistics of natural
images and the response properties of cortical cells.
"""

import numpy as np
from numpy.typing import NDArray

_SEED = 20260711
_MEAN, _STDDEV = 0.5, 0.2
"""Brightness of a picture, black 0 and white 1; its values are cut off there."""


def generated_images(count: int, side: int) -> NDArray[np.float64]:
    """Pictures (count, side, side) of values 0..1, periodic."""
    # Whole numbers of a bit generator whose stream numpy promises to keep; sums of four are nearly normal.
    raw = np.random.Philox(key=_SEED).random_raw(count * side * side).astype("<u8")
    noise = raw.view("<u2").reshape(count, side, side, 4).sum(axis=3, dtype=np.int64)
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequencies[0, 0] = np.inf
    pictures = np.fft.irfft2(np.fft.rfft2(noise - 2.0 * (2**16 - 1)) / frequencies, s=(side, side))
    pictures *= _STDDEV / pictures.std(axis=(1, 2), keepdims=True)
    return np.asarray(np.clip(pictures + _MEAN, 0, 1))
