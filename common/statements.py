"""Signed statements: a JSON document with the hospital's public key and signature, verifiable offline.

Signature: ECDSA over SHA-384 with the hospital's P-384 key, on the canonical JSON (sorted keys, no spaces,
UTF-8) of everything but the signature itself. What a statement says is its signer's word: a signature proves
who said it and that nothing was changed since, not that it is true.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ConfigError
from common.node_keys import parse_public_key

SCHEMA = 1
RELEASE_CERTIFICATE = "release-certificate"
"""Kind of what a hospital says of one run and one model (`client.certificate`)."""
LARGEST_STATEMENT = 65_536
"""Bytes of a statement at most, where one arrives from elsewhere."""
_HASH = ec.ECDSA(hashes.SHA384())
_FIELDS = {"schema", "kind", "content", "public_key", "signature"}


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement whose signature is right."""

    kind: str
    """What it is: `ledger`, `release-certificate`."""
    content: dict[str, Any]
    fingerprint: str
    """Of the key that signed, as `ssh-keygen -l` prints it; compare it with the roster's."""


def sign_statement(key: ec.EllipticCurvePrivateKey, *, kind: str, content: Mapping[str, Any]) -> str:
    """The statement as JSON text. `content` holds plain JSON values, no NaN and no infinity."""
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    document = {"schema": SCHEMA, "kind": kind, "content": dict(content), "public_key": public.decode()}
    signature = key.sign(_signed_bytes(document), _HASH)
    return json.dumps({**document, "signature": base64.b64encode(signature).decode()}, indent=2)


def verify_statement(text: str) -> Statement:
    """Check the signature with the key in the statement. Raises ConfigError where it is not right."""
    try:
        document = json.loads(text)
        if set(document) != _FIELDS or document["schema"] != SCHEMA:
            raise ValueError("other fields than a statement's")
        signature = base64.b64decode(document.pop("signature"), validate=True)
        line = str(document["public_key"])
        signer = serialization.load_ssh_public_key(line.encode())
        if not isinstance(signer, ec.EllipticCurvePublicKey):
            raise ValueError("not an elliptic-curve key")
        signer.verify(signature, _signed_bytes(document), _HASH)
        fingerprint = parse_public_key(line, source="the statement's key").fingerprint
        return Statement(
            kind=str(document["kind"]), content=dict(document["content"]), fingerprint=fingerprint
        )
    except InvalidSignature:
        why = "the signature does not fit: the statement was changed, or another key signed it"
    except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        why = f"it cannot be read as one ({str(error)[:120]})"
    raise ConfigError(
        "this is no valid signed statement", why=why, fix="ask the hospital that signed it for the file again"
    )


def _signed_bytes(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()
