"""The hospitals' newest ledger receipts: sealed bytes that the server keeps and echoes, and cannot read.

With them a hospital notices that an older copy of its ledger was put back. One file per hospital, the last
one received: the server cannot tell which of two is newer. They outlive runs where `runtime.receipts` names a
folder (`flower-server start` does).
"""

import logging
from pathlib import Path

from flwr.app import Message, RecordDict

from common import messages
from common.errors import WireError
from common.files import write_bytes_atomically
from server.federation import Federation
from server.hospitals import Hospital
from server.update_checks import Question, check_sender_and_key

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
        receipt = messages.receipt_of(content)
        if receipt and receipt != newest_receipt(federation, name):
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


def _path(federation: Federation, name: str) -> Path:
    named = federation.config.runtime.receipts
    folder = Path(named) if named else federation.folder.path / "receipts"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / f"{name}.receipt"
