"""Where sampling and noise come from: a cipher keyed by the operating system, or (tests only) a seed.

A private run draws from `SecureRandomness`: every stream has its own 256-bit key of OS entropy, so hospitals,
rounds, processes and restarts never share noise, and nobody who knows the configuration can subtract it. Keys
are never stored, printed, pickled or carried over a fork. `ReproducibleRandomness` derives everything from
public numbers: a run that uses it claims no privacy (`private` is False).
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Literal, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from common.errors import GuardError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Halves = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]
Purpose = Literal["sampling", "noise", "rounding", "shuffle", "augmentation", "evaluation"]
Size = int | tuple[int, ...]
Room = TypeVar("Room")

_BLOCK = 1 << 18
_PAIRS = 1 << 17
_LOWER_63_BITS = np.uint64(2**63 - 1)
_ELEVEN = np.uint64(11)
_ZEROS = bytes(1 << 22)
_SPARE = 64


class Rooms(Generic[Room]):
    """Working memory that threads borrow for a block and give back, so that none is ever fresh.

    Unlike memory of a thread it outlives the thread. What is left in it is as secret as the noise.
    """

    def __init__(self, make: Callable[[], Room]) -> None:
        self._make = make
        self._free: list[Room] = []

    @contextmanager
    def borrowed(self) -> Iterator[Room]:
        """A room of one's own; there are as many as were ever borrowed at once."""
        try:
            room = self._free.pop()  # as `append` one operation, which no other thread divides
        except IndexError:
            room = self._make()
        try:
            yield room
        finally:
            self._free.append(room)


class _PairRoom:
    def __init__(self) -> None:
        self.words: Words = np.empty(_PAIRS + _SPARE, dtype="<u8")
        self.radii: Floats = np.empty(_PAIRS)
        self.angles: Floats = np.empty(_PAIRS)


_ROOMS = Rooms(_PairRoom)


def polar_normals(radii: Words, angles: Words, stddev: float = 1.0) -> Floats:
    """Two independent normals for each pair of random 64-bit words, (2, pairs); eats the words.

    The radius is stddev sqrt(-2 log u) for u = (k + 1/2) / 2**63 with the lower 63 bits k of the word: u is
    never 0, so no draw is infinite, and 9.4 stddev is the largest. The angle has 53 bits. Every draw takes
    the same operations, whatever its size.
    Source: Box and Muller, A Note on the Generation of Random Normal Deviates, 1958.
    """
    normals, radius, angle = np.empty((2, len(radii))), np.empty(len(radii)), np.empty(len(radii))
    _fill_radii(radii, radius, stddev)
    _fill_angles(angles, angle)
    _fill_products(radius, angle, normals[0], normals[1])
    return normals


def _fill_radii(words: Words, into: Floats, stddev: float) -> None:
    import torch

    # torch's logarithm, root, sine and cosine, several times faster than numpy's and scipy's; numpy's
    # arithmetic, whose calls are shorter; from signed numbers, which processors convert faster.
    np.bitwise_and(words, _LOWER_63_BITS, out=words)
    np.copyto(into, words.view(np.int64))
    into += 0.5
    into *= 2.0**-63
    logarithm = torch.from_numpy(into).log_()
    into *= -2.0 * stddev**2
    logarithm.sqrt_()


def _fill_angles(words: Words, into: Floats) -> None:
    np.right_shift(words, _ELEVEN, out=words)
    np.copyto(into, words.view(np.int64))
    into *= 2.0 * math.pi * 2.0**-53


def _fill_products(radii: Floats, angles: Floats, first: Floats, second: Floats) -> None:
    """Radius times cosine and radius times sine; the second may leave out the last."""
    import torch

    torch.cos(torch.from_numpy(angles), out=torch.from_numpy(first))
    first *= radii
    torch.sin(torch.from_numpy(angles[: len(second)]), out=torch.from_numpy(second))
    second *= radii[: len(second)]


class Stream(Protocol):
    """A sequence of independent random numbers for one purpose in one step."""

    __slots__ = ()

    def uniform(self, size: Size) -> Floats:
        """Uniform in [0, 1) with 53 random bits."""

    def normal(self, size: Size) -> Floats:
        """Standard normal."""
        flat = np.empty(_count(size))
        self.fill_normal(flat)
        return flat.reshape(size)

    def fill_normal(self, into: Floats, stddev: float = 1.0) -> None:
        """Normal of mean 0 in all of `into`, float64 (n,) without gaps."""

    def integers(self, high: int, size: Size) -> Integers:
        """Uniform whole numbers in 0..high-1."""
        flat = np.empty(_count(size), dtype=np.int64)
        self.fill_integers(high, flat)
        return flat.reshape(size)

    def fill_integers(self, high: int, into: Integers | Halves) -> None:
        """Uniform whole numbers in 0..high-1 in all of `into`, int64 or int32 (n,) without gaps.

        Raises ValueError where they do not fit into its type.
        """

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


class _PhiloxStream(Stream):
    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def uniform(self, size: Size) -> Floats:
        return self._generator.random(size)

    def fill_normal(self, into: Floats, stddev: float = 1.0) -> None:
        self._generator.standard_normal(out=into)
        into *= stddev

    def fill_integers(self, high: int, into: Integers | Halves) -> None:
        _check_high(high, into)
        into[:] = self._generator.integers(high, size=len(into), dtype=np.int64)

    def permutation(self, n: int) -> Integers:
        return self._generator.permutation(n).astype(np.int64, copy=False)


class _ChaChaStream(Stream):
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

    def fill_normal(self, into: Floats, stddev: float = 1.0) -> None:
        """Two at a time by the polar form (`polar_normals`), in each block all cosines before the sines."""
        with _ROOMS.borrowed() as room:
            for start in range(0, len(into), 2 * _PAIRS):
                block = into[start : start + 2 * _PAIRS]
                pairs = -(-len(block) // 2)
                radii, angles = room.radii[:pairs], room.angles[:pairs]
                _fill_radii(self._words(pairs, room.words), radii, stddev)
                _fill_angles(self._words(pairs, room.words), angles)
                _fill_products(radii, angles, block[:pairs], block[pairs:])

    def fill_integers(self, high: int, into: Integers | Halves) -> None:
        """Without modulo bias: powers of two take the lowest bits of a word or half of one, always as many.

        For others, words above the last whole multiple are drawn again.
        """
        _check_high(high, into)
        if high & (high - 1):
            last, kept = np.uint64(2**64 - 1 - 2**64 % high), 0
            while kept < len(into):
                words = self._words(len(into) - kept)
                words = words[words <= last]
                into[kept : kept + len(words)] = words % np.uint64(high)
                kept += len(words)
            return
        halves = high <= 2**31
        with _ROOMS.borrowed() as room:
            for start in range(0, len(into), 2 * _PAIRS if halves else _PAIRS):
                if halves:
                    block = into[start : start + 2 * _PAIRS]
                    words = self._words(-(-len(block) // 2), room.words)
                    np.bitwise_and(words.view("<i4")[: len(block)], np.int32(high - 1), out=block)
                else:
                    block = into[start : start + _PAIRS]
                    words = self._words(len(block), room.words)
                    np.bitwise_and(words.view("<i8"), np.int64(high - 1), out=block)

    def permutation(self, n: int) -> Integers:
        """0..n-1 sorted by 64 random bits each."""
        return np.argsort(self._words(n), kind="stable").astype(np.int64, copy=False)

    def _fill(self, size: Size, convert: "_Convert") -> Floats:
        flat = np.empty(_count(size))
        for start in range(0, len(flat), _BLOCK):
            block = flat[start : start + _BLOCK]
            block[:] = convert(self._words(len(block)))
        return flat.reshape(size)

    def _words(self, count: int, into: Words | None = None) -> Words:
        """Fresh words, at the beginning of `into` if given, which is _SPARE words longer."""
        if os.getpid() != self._process:
            raise GuardError(
                "a stream of randomness was carried into another process",
                why="both processes would draw the same noise",
                fix="ask the source for a new stream after a fork",
            )
        size = 8 * count
        zeros = memoryview(_ZEROS)[:size] if size <= len(_ZEROS) else bytes(size)
        # The cipher asks for some room behind.
        words = np.empty(count + _SPARE, dtype="<u8") if into is None else into[: count + _SPARE]
        self._cipher.update_into(zeros, words.data.cast("B"))
        return words[:count]


class _Convert(Protocol):
    def __call__(self, words: npt.NDArray[np.uint64], /) -> Floats: ...


def _count(size: Size) -> int:
    return size if isinstance(size, int) else math.prod(size)


def _check_high(high: int, into: Integers | Halves) -> None:
    most = int(np.iinfo(into.dtype).max) + 1
    if not 1 <= high <= most:
        raise ValueError(f"high must be between 1 and 2**{most.bit_length() - 1}, got {high}")
