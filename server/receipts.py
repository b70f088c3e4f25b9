"""The hospitals' newest ledger receipts: sealed bytes that the server keeps and echoes, and cannot read.

With them a hospital notices that an older copy of its ledger was put back. One file per hospital, the last
one received: the server cannot tell which of two is newer. Which ledger issued a receipt is in clear; the
last one of an earlier ledger stays beside, as `NAME.ID.receipt`: a ledger that was given up can come back.
They outlive runs where `runtime.receipts` names a folder (`flower-server start` does).
"""

import logging
from pathlib import Path

from flwr.app import Message, RecordDict

from common import messages
from common.errors import WireError
from common.files import write_bytes_atomically
from common.ledger_receipts import ID_BYTES, issuer_of
from server.federation import Federation
from server.hospitals import Hospital
from server.update_checks import Question, check_sender_and_key

_MOST_EARLIER = 16
"""Ledgers of one hospital whose receipts are kept: nobody fills the disk with ever new ones."""

log = logging.getLogger(__name__)


def newest_receipt(federation: Federation, name: str) -> bytes:
    """What hospital `name` sent last, b"" where there is nothing readable."""
    try:
        content = _path(federation, name).read_bytes()
    except OSError:
        return b""
    return content if len(content) <= messages.LARGEST_RECEIPT else b""


def keep_receipt(federation: Federation, name: str, content: RecordDict) -> None:
    """Keep the receipt in an answer of hospital `name`, if there is one. Never ends a run.

    Call it only for answers whose sender and round key are in order.
    """
    try:
        receipt, before = messages.receipt_of(content), newest_receipt(federation, name)
        if receipt and receipt != before:
            if (ledger := issuer_of(before)) is not None and ledger != issuer_of(receipt):
                _set_aside(federation, name, before, ledger)
            write_bytes_atomically(_path(federation, name), receipt, mode=0o600)
    except WireError:
        log.warning("%s sent a ledger receipt that is none; it is not kept", name)
    except OSError as error:
        log.warning("the ledger receipt of %s cannot be kept (%s)", name, error.strerror)


def keep_receipt_of(federation: Federation, reply: Message, question: Question, hospital: Hospital) -> None:
    """Keep the receipt of a reply, aggregated or not, when it is this hospital's to this question."""
    if reply.has_error():
        return
    try:
        check_sender_and_key(reply, question, hospital)
    except Exception:  # a stranger's content: nothing in it is kept
        return
    keep_receipt(federation, hospital.name, reply.content)


def _set_aside(federation: Federation, name: str, receipt: bytes, ledger: bytes) -> None:
    """Keep the last receipt of a ledger that the hospital no longer goes on with, and tell the operator."""
    log.warning(
        "%s goes on with another ledger than before: if they began no new one on purpose, ask them to look",
        name,
    )
    path = _path(federation, name).with_name(f"{name}.{ledger.hex()}.receipt")
    others = list(path.parent.glob(f"{name}.{'[0-9a-f]' * 2 * ID_BYTES}.receipt"))
    if path in others or len(others) < _MOST_EARLIER:
        write_bytes_atomically(path, receipt, mode=0o600)


def _path(federation: Federation, name: str) -> Path:
    named = federation.config.runtime.receipts
    folder = Path(named) if named else federation.folder.path / "receipts"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / f"{name}.receipt"
