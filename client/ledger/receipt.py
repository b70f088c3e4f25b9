"""A receipt of the ledger: what it held at a moment, sealed so that only its own hospital can read it.

Encrypted and authenticated (AES-256-GCM, fresh nonce, key derived from the site's key), always of one size:
whoever keeps one learns nothing of what it says, cannot forge one, cannot tell two apart by what they say.
In clear is which ledger issued it, 8 bytes derived from the site's key: so a hospital whose ledger was lost
with its key still sees that there was another. Who has receipts of several studies can see by it that they
come from the same ledger.
"""

import json
import secrets
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from client.ledger.ledger import Ledger
from client.ledger.records import Charge
from common.ledger_receipts import ID_BYTES, MAGIC, issuer_of
from common.messages import LARGEST_RECEIPT
from common.privacy.accountant import Kinds, merge
from common.privacy.plan import PrivacyEvent

SIZE = LARGEST_RECEIPT
"""Bytes of every receipt, so that its length tells nothing; the largest that travels."""
_NONCE, _TAG = 12, 16
_ROOM = SIZE - len(MAGIC) - ID_BYTES - _NONCE - _TAG - 4
_RECENT_HEADS = 512
"""So many lost charges are told apart from the others exactly."""
HEAD_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a ledger held; private, readable under its site's key only."""

    number: int
    """Charges in it."""
    head: str
    """Hash of the last one; empty for none."""
    seals: int
    """Sealed answers in it."""
    heads: dict[int, str] = field(repr=False)
    """First 16 digits of the hash of the last charges, and of ever fewer before them, by number."""
    kinds: Kinds
    """All events that claim privacy, of all cohorts, merged: (sampling rate, noise multiplier, steps)."""
    bounded: Kinds = ()
    """At most one kind that costs more than all those together for which there was no room."""
    not_private: int
    """Charges that claim no privacy."""
    delta: float
    """Of the last charge; 0 for none."""
    purposes: dict[str, int]
    """Charges by purpose."""

    def contains(self, earlier: "Receipt") -> bool:
        """Whether the same ledger issued the `earlier` one."""
        known = self.heads.get(earlier.number) == earlier.head[:HEAD_DIGITS]
        return known and self.seals >= earlier.seals


def receipt_of_charges(charges: Sequence[Charge]) -> Receipt:
    """The receipt of a ledger with these charges."""
    last = len(charges)
    numbers = {*range(max(1, last - _RECENT_HEADS + 1), last + 1), *(last - 2**e for e in range(9, 31))}
    purposes = [charge.purpose for charge in charges]
    return Receipt(
        number=last,
        head=charges[-1].hash if charges else "",
        seals=sum(charge.sealed_sha256 is not None for charge in charges),
        heads={number: charges[number - 1].hash[:HEAD_DIGITS] for number in sorted(numbers) if number > 0},
        kinds=kinds_of(charges),
        not_private=sum(not charge.claims_privacy for charge in charges),
        delta=charges[-1].delta if charges else 0.0,
        purposes={purpose: purposes.count(purpose) for purpose in sorted(set(purposes))},
    )


def kinds_of(charges: Iterable[Charge]) -> Kinds:
    """The events of these charges that claim privacy, merged."""
    return merge(charge.event for charge in charges if charge.event is not None and charge.claims_privacy)


def issue(ledger: Ledger) -> bytes:
    """A receipt of the ledger as it is, `SIZE` bytes; only `read` with this ledger's key opens it."""
    body = _packed(receipt_of_charges(ledger.charges()))
    nonce = secrets.token_bytes(_NONCE)
    text = len(body).to_bytes(4, "big") + body + bytes(_ROOM - len(body))
    clear = MAGIC + ledger_id(ledger.site_key)
    return clear + nonce + AESGCM(_key(ledger.site_key)).encrypt(nonce, text, clear)


def ledger_id(site_key: bytes) -> bytes:
    """8 public bytes that name the ledger with this key, and say nothing about the key."""
    return derived_key(site_key, b"receipt folder")[:ID_BYTES]


def read(site_key: bytes, content: bytes) -> Receipt | None:
    """The receipt in `content`, None when it is not this ledger's own or was changed."""
    if issuer_of(content) != ledger_id(site_key):
        return None
    clear = len(MAGIC) + ID_BYTES
    start = clear + _NONCE
    try:
        text = AESGCM(_key(site_key)).decrypt(content[clear:start], content[start:], content[:clear])
    except InvalidTag:
        return None
    fields = json.loads(zlib.decompress(text[4 : 4 + int.from_bytes(text[:4], "big")]))
    return Receipt(
        **{
            **fields,
            "heads": {int(number): digits for number, digits in fields["heads"].items()},
            "kinds": tuple((q, sigma, steps) for q, sigma, steps in fields["kinds"]),
            "bounded": tuple((q, sigma, steps) for q, sigma, steps in fields["bounded"]),
        }
    )


def common_charges(charges: Sequence[Charge], receipt: Receipt) -> int:
    """How many charges the ledger certainly shares with the one that issued the receipt.

    A hash stands for all lines before it. Beyond `_RECENT_HEADS` lost charges the number is a lower bound.
    """
    return max(
        (
            number
            for number, digits in receipt.heads.items()
            if number <= len(charges) and charges[number - 1].hash.startswith(digits)
        ),
        default=0,
    )


def covers_in_words(receipt: Receipt) -> str:
    """The heads of a receipt as one line for the ledger."""
    return ",".join(f"{number}:{digits}" for number, digits in sorted(receipt.heads.items()))


def covered_heads(line: str) -> dict[int, str]:
    """The inverse of `covers_in_words`."""
    pairs = (pair.partition(":") for pair in line.split(","))
    return {int(number): digits for number, _, digits in pairs if number.isdecimal()}


def _packed(receipt: Receipt) -> bytes:
    """Compressed JSON that fits; where it does not, kinds are bounded by one that costs more than they."""
    kinds, bounded = list(receipt.kinds), list(receipt.bounded)
    while True:
        body = zlib.compress(json.dumps({**vars(receipt), "kinds": kinds, "bounded": bounded}).encode(), 9)
        if len(body) <= _ROOM:
            return body
        half = (len(kinds) + 1) // 2
        bounded, kinds = [bound_of([*bounded, *kinds[:half]])], kinds[half:]


def bound_of(kinds: Sequence[tuple[float, float, int]]) -> tuple[float, float, int]:
    """One kind that costs at least as much: the highest rate, the least noise, all steps."""
    return (max(q for q, _, _ in kinds), min(s for _, s, _ in kinds), sum(n for _, _, n in kinds))


def events_of(kinds: Kinds) -> list[PrivacyEvent]:
    """One event for each kind."""
    return [PrivacyEvent(sampling_rate=q, noise_multiplier=sigma, steps=n) for q, sigma, n in kinds]


def _key(site_key: bytes) -> bytes:
    return derived_key(site_key, b"ledger receipt")


def derived_key(site_key: bytes, label: bytes) -> bytes:
    """32 bytes that say nothing about the site's key or another label's."""
    info = b"hospital-federation " + label + b" 1"
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(site_key)
