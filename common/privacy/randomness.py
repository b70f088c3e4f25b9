"""Where sampling and noise come from: a cipher keyed by the operating system, or (tests only) a seed.

A private run draws from `SecureRandomness`: every stream has its own 256-bit key of OS entropy, so hospitals,
rounds, processes and restarts never share noise, and nobody who knows the configuration can subtract it. Keys
are never stored, printed, pickled or carried over a fork. `ReproducibleRandomness` derives everything from
public numbers: a run that uses it claims no privacy (`private` is False).
"""

import hashlib
import math
import os
from typing import Literal, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import GuardError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Purpose = Literal["sampling", "noise", "rounding", "shuffle", "augmentation", "evaluation"]
Size = int | tuple[int, ...]

_BLOCK = 1 << 16
_PAIRS = 1 << 14
_LOWER_63_BITS = np.uint64(2**63 - 1)
_ELEVEN = np.uint64(11)
_ZEROS = bytes(1 << 19)
_SPARE = 64


def polar_normals(radii: npt.NDArray[np.uint64], angles: npt.NDArray[np.uint64]) -> Floats:
    """Two independent standard normals for each pair of random 64-bit words, (2, pairs); eats the words.

    The radius is sqrt(-2 log u) for u = (k + 1/2) / 2**63 with the lower 63 bits k of the word: u is never 0,
    so no draw is infinite, and 9.4 is the largest. The angle has 53 bits. Every draw takes the same
    operations, whatever its size.
    Source: Box and Muller, A Note on the Generation of Random Normal Deviates, 1958.
    """
    import torch

    # torch's logarithm, sine and cosine, several times faster than numpy's and scipy's; from signed numbers,
    # which processors convert faster.
    lower = torch.from_numpy(np.bitwise_and(radii, _LOWER_63_BITS, out=radii).view(np.int64))
    radius = lower.double().add_(0.5).mul_(2.0**-63).log_().mul_(-2.0).sqrt_()
    upper = torch.from_numpy(np.right_shift(angles, _ELEVEN, out=angles).view(np.int64))
    angle = upper.double().mul_(2.0 * math.pi * 2.0**-53)
    normals = torch.empty(2, len(radii), dtype=torch.float64)
    torch.cos(angle, out=normals[0])
    torch.sin(angle, out=normals[1])
    normals *= radius
    result: Floats = normals.numpy()
    return result


class Stream(Protocol):
    """A sequence of independent random numbers for one purpose in one step."""

    def uniform(self, size: Size) -> Floats:
        """Uniform in [0, 1) with 53 random bits."""

    def normal(self, size: Size) -> Floats:
        """Standard normal."""

    def integers(self, high: int, size: Size) -> Integers:
        """Uniform whole numbers in 0..high-1."""

    def permutation(self, n: int) -> Integers:
        """0..n-1 in random order."""


class RandomnessSource(Protocol):
    """Hands out a stream per purpose, round, step and part of a step."""

    private: bool
    """Whether what is drawn may carry a privacy claim."""

    def stream(self, *, purpose: Purpose, round_number: int, step: int, part: int = 0) -> Stream:
        """A stream of its own; streams of different arguments are independent."""


class SecureRandomness:
    """OS entropy through ChaCha20; the same arguments give another stream each time."""

    private = True

    def stream(self, *, purpose: Purpose, round_number: int, step: int, part: int = 0) -> Stream:
        """A fresh stream; the arguments decide nothing, every stream has its own key."""
        return _ChaChaStream()


class ReproducibleRandomness:
    """Everything from (seed, hospital, purpose, round, step). For tests: claims nothing."""

    private = False

    def __init__(self, seed: int, hospital: str) -> None:
        self._seed, self._hospital = seed, hospital

    def stream(self, *, purpose: Purpose, round_number: int, step: int, part: int = 0) -> Stream:
        """The stream of these arguments, the same bits on every machine and in every process."""
        name = f"{self._seed}\0{self._hospital}\0{purpose}\0{round_number}\0{step}\0{part}"
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
        return _PhiloxStream(np.random.Generator(np.random.Philox(key=key)))


class _PhiloxStream:
    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def uniform(self, size: Size) -> Floats:
        return self._generator.random(size)

    def normal(self, size: Size) -> Floats:
        return self._generator.standard_normal(size)

    def integers(self, high: int, size: Size) -> Integers:
        return self._generator.integers(high, size=size, dtype=np.int64)

    def permutation(self, n: int) -> Integers:
        return self._generator.permutation(n).astype(np.int64, copy=False)


class _ChaChaStream:
    """ChaCha20 keystream as numbers, in blocks of half a megabyte; holds the cipher, never the key."""

    __slots__ = ("_cipher", "_process")

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        # A key is used for one stream only, so counter and nonce may start at zero.
        self._cipher = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
        self._process = os.getpid()

    def __repr__(self) -> str:
        return "<stream of secure randomness>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("secure randomness must not be stored or copied")

    def uniform(self, size: Size) -> Floats:
        """Uniform in [0, 1): the upper 53 bits of each 64."""
        return self._fill(size, lambda words: (words >> np.uint64(11)) * 2.0**-53)

    def normal(self, size: Size) -> Floats:
        """Standard normal, two at a time, by the polar form (`polar_normals`)."""
        flat = np.empty(_count(size))
        for start in range(0, len(flat), 2 * _PAIRS):
            block = flat[start : start + 2 * _PAIRS]
            pairs = -(-len(block) // 2)
            block[:] = polar_normals(self._words(pairs), self._words(pairs)).reshape(-1)[: len(block)]
        return flat.reshape(size)

    def integers(self, high: int, size: Size) -> Integers:
        """Uniform in 0..high-1 without modulo bias: words above the last whole multiple are drawn again."""
        if not 1 <= high <= 2**63:
            raise ValueError(f"high must be between 1 and 2**63, got {high}")
        count = _count(size)
        if high & (high - 1) == 0:  # a power of two divides the words evenly, also halves of them
            if high <= 2**32:
                halves = self._words(-(-count // 2)).view("<u4")[:count]
                return (halves & np.uint32(high - 1)).astype(np.int64).reshape(size)
            return (self._words(count) & np.uint64(high - 1)).view(np.int64).reshape(size)
        kept = np.empty(0, dtype=np.uint64)
        last = np.uint64(2**64 - 1 - 2**64 % high)
        while len(kept) < count:
            words = self._words(count - len(kept))
            kept = np.concatenate([kept, words[words <= last]])
        return (kept % np.uint64(high)).astype(np.int64).reshape(size)

    def permutation(self, n: int) -> Integers:
        """0..n-1 sorted by 64 random bits each."""
        return np.argsort(self._words(n), kind="stable").astype(np.int64, copy=False)

    def _fill(self, size: Size, convert: "_Convert") -> Floats:
        flat = np.empty(_count(size))
        for start in range(0, len(flat), _BLOCK):
            block = flat[start : start + _BLOCK]
            block[:] = convert(self._words(len(block)))
        return flat.reshape(size)

    def _words(self, count: int) -> npt.NDArray[np.uint64]:
        if os.getpid() != self._process:
            raise GuardError(
                "a stream of randomness was carried into another process",
                why="both processes would draw the same noise",
                fix="ask the source for a new stream after a fork",
            )
        size = 8 * count
        zeros = memoryview(_ZEROS)[:size] if size <= len(_ZEROS) else bytes(size)
        words = np.empty(count + _SPARE, dtype="<u8")  # the cipher asks for some room behind
        self._cipher.update_into(zeros, words.data.cast("B"))
        return words[:count]


class _Convert(Protocol):
    def __call__(self, words: npt.NDArray[np.uint64], /) -> Floats: ...


def _count(size: Size) -> int:
    return size if isinstance(size, int) else math.prod(size)
