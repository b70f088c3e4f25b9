"""Who calls, from the headers alone: not a byte of a body is taken in before its sender is known."""

import datetime
import logging
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    MAX_TIMESTAMP_DIFF_SECONDS,
    MIN_TIMESTAMP_DIFF_SECONDS,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    public_key_to_bytes,
    uses_nist_ec_curve,
    verify_signature,
)

from common.errors import ConfigError
from common.node_keys import fingerprint_of_pem
from server.deployment.bell import Bell
from server.provisioning.roster import read_roster

TIMESTAMP_HEADER = "flwr-timestamp"
_LONGEST_KEY, _LONGEST_SIGNATURE, _LONGEST_TIMESTAMP = 600, 300, 64
"""Characters; those of the largest NIST curve, P-521, are 360 and 188."""

log = logging.getLogger("front")


class Standing(StrEnum):
    """What a caller's headers prove."""

    ENROLLED = "enrolled"
    """The key is on the roster and has signed within Flower's window."""
    STRANGER = "stranger"
    """The key has signed and is not on the roster, or not any more."""
    AGED = "aged"
    """An enrolled key has signed, too long ago."""
    UNPROVED = "unproved"
    """No key, no signature, a wrong one, or a clock outside Flower's window."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """One request's sender."""

    standing: Standing
    key: str = ""
    """Fingerprint of the key that has signed; empty where none has."""


class Callers:
    """Knows the roster, and reads it again when it has changed."""

    def __init__(self, roster: Path, clock: Callable[[], datetime.datetime] | None = None) -> None:
        """Raises ConfigError for a broken roster; one that breaks later is left as it was."""
        self._path = roster
        self._clock = clock or _now
        self._tone = Bell(roster).tone
        self._enrolled = _active(roster)

    def of(self, headers: Mapping[str, str]) -> Caller:
        """Judge the three headers of a request; costs a signature check of about 1 ms."""
        timestamp = headers.get(TIMESTAMP_HEADER, "")
        try:
            age_s = (self._clock() - datetime.datetime.fromisoformat(timestamp)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return Caller(standing=Standing.UNPROVED)
        key = headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, "")
        signature = headers.get(FLEET_HTTP_SIGNATURE_HEADER, "")
        lengths = (len(key), len(signature), len(timestamp))
        too_long = any(
            n > most
            for n, most in zip(lengths, (_LONGEST_KEY, _LONGEST_SIGNATURE, _LONGEST_TIMESTAMP), strict=True)
        )
        if age_s <= MIN_TIMESTAMP_DIFF_SECONDS or too_long:
            return Caller(standing=Standing.UNPROVED)
        if not (fingerprint := _signed_by(key, timestamp, signature)):
            return Caller(standing=Standing.UNPROVED)
        is_enrolled = fingerprint in self._active_now()
        if age_s >= MAX_TIMESTAMP_DIFF_SECONDS:
            return Caller(standing=Standing.AGED if is_enrolled else Standing.UNPROVED, key=fingerprint)
        return Caller(standing=Standing.ENROLLED if is_enrolled else Standing.STRANGER, key=fingerprint)

    def _active_now(self) -> frozenset[str]:
        if (tone := Bell(self._path).tone) != self._tone:
            self._tone = tone
            try:
                self._enrolled = _active(self._path)
            except ConfigError as error:
                log.error("the roster is left as it was: %s", error.what)
        return self._enrolled


@lru_cache(maxsize=1024)
def _signed_by(key: str, timestamp: str, signature: str) -> str:
    """Fingerprint of the key whose signature this is; empty without one. Held pulls come again with it."""
    if (known := _known(key)) is None:
        return ""
    try:
        is_signed = verify_signature(known[0], timestamp.encode("ascii"), b64decode(signature, validate=True))
    except (ValueError, TypeError):
        return ""
    return known[1] if is_signed else ""


@lru_cache(maxsize=512)
def _known(header: str) -> tuple[ec.EllipticCurvePublicKey, str] | None:
    """The key in a header, and its fingerprint; only in the very form in which Flower stores it."""
    try:
        pem = b64decode(header, validate=True)
        if not isinstance(serialization.load_pem_public_key(pem), ec.EllipticCurvePublicKey):
            return None
        key = bytes_to_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    if not uses_nist_ec_curve(key) or public_key_to_bytes(key) != pem:
        return None
    return key, fingerprint_of_pem(pem)


def _active(roster: Path) -> frozenset[str]:
    return frozenset(entry.fingerprint for entry in read_roster(roster) if entry.is_active)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
