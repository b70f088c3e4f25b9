"""The readable head of a ledger receipt: which ledger issued it. The rest only its own hospital can read."""

from common.messages import LARGEST_RECEIPT

MAGIC = b"HFLR\x02"
"""First bytes of every receipt; the last one is the version of its form."""
ID_BYTES = 8
"""Length of the public id that follows: derived from the ledger's key, it tells nothing else."""


def issuer_of(content: bytes) -> bytes | None:
    """Which ledger `content` says to come from, unauthenticated; None where it is no receipt at all."""
    if len(content) != LARGEST_RECEIPT or not content.startswith(MAGIC):
        return None
    return content[len(MAGIC) :][:ID_BYTES]
