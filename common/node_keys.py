"""A hospital's key: NIST P-384, made at the hospital, known to the operator by its fingerprint.

The private key never leaves the hospital and is refused when others on its machine could read it.
"""

import base64
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """The public half of a hospital's key."""

    openssh: str
    """One line as in `*.pub`, with the comment if there is one."""
    pem: bytes
    """PEM as Flower stores and shows it."""

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it: SHA256 and base64 without padding."""
        digest = hashlib.sha256(base64.b64decode(self.openssh.split()[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def make_key(private: Path, public: Path, *, comment: str) -> str:
    """Make a key pair, private file 0600; gives its fingerprint. Raises ConfigError if one exists."""
    key = ec.generate_private_key(ec.SECP384R1())
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_secret(private, content)
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    public.write_text(f"{line.decode()} {comment}\n")
    return _public_key(key.public_key(), comment).fingerprint


def load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key that only its owner can read. Raises ConfigError."""
    refuse_readable_by_others(path)
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is not a private key in OpenSSH form without passphrase",
            why=str(error).splitlines()[0] if str(error) else "it cannot be read",
            fix="restore it from your backup, or make a new key: flower-client renew-key",
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic-curve key", fix="make one: flower-client renew-key")
    return key


def load_public_key(path: Path) -> PublicKey:
    """Read a public key file (`*.pub`). Raises ConfigError."""
    try:
        line = path.read_text().strip()
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", fix="name the hospital's public key (*.pub)") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read", why=str(error)) from None
    return parse_public_key(line, source=str(path))


def parse_public_key(line: str, *, source: str) -> PublicKey:
    """Read one line of OpenSSH form. Raises ConfigError, also for a private key handed over by mistake."""
    if "PRIVATE KEY" in line:
        raise ConfigError(
            f"{source} is a private key",
            why="it must never leave the hospital's machine",
            fix="have the hospital make a new key (flower-client renew-key) and send its .pub file",
        )
    try:
        key = serialization.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not key.curve.name.startswith("secp"):
        raise ConfigError(
            f"{source} is not a public key of a hospital",
            why="expected one line that begins with ecdsa-sha2-nistp384",
            fix="use keys/hospital.key.pub that flower-client init has made",
        )
    return _public_key(key, " ".join(line.split()[2:]))


def public_key_of(private: ec.EllipticCurvePrivateKey) -> PublicKey:
    """The public half of `private`."""
    return _public_key(private.public_key(), "")


def fingerprint_of_pem(pem: bytes) -> str:
    """Fingerprint of a key as Flower shows it; empty when it is none."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        return ""
    return _public_key(key, "").fingerprint if isinstance(key, ec.EllipticCurvePublicKey) else ""


def write_secret(path: Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write a file that only its owner can read. Raises ConfigError rather than write over another one."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if overwrite else os.O_EXCL)
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists already",
            why="a key or secret is never written over",
            fix="choose another folder, or move that file away first",
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def refuse_readable_by_others(path: Path) -> None:
    """Raise ConfigError when `path` is missing or its mode lets others than its owner in."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", fix="restore it from your backup") from None
    if mode & 0o077:
        raise ConfigError(
            f"{path} can be read by others on this machine",
            why=f"its mode is {mode:04o}, expected 0600",
            fix=f"chmod 600 {path}",
        )


def _public_key(key: ec.EllipticCurvePublicKey, comment: str) -> PublicKey:
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(openssh=f"{line} {comment}".strip(), pem=pem)
