"""Receipts that are kept outside the ledger's folder: in the study's state folder and at the servers.

An older copy of the whole ledger folder is right in itself; only something outside it can tell that charges
are missing. So after each charge and each sealed answer the hospital makes a receipt
(`client.ledger.receipt`), keeps it and sends it along; servers echo the last one they got. A ledger that
holds less than a receipt says, or something else, trains nothing.

What no local check can detect: a machine put back to an older day as a whole (ledger and state folder alike)
whose servers echo nothing newer, be it a first contact, a server that lost or withholds its copy, or one that
was itself put back. And a charge that no receipt left the machine for is lost with the machine.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Message

from client.ledger.ledger import Ledger
from client.ledger.receipt import HEAD_DIGITS, Receipt, covered_heads, issue, ledger_id, read
from client.ledger.records import RECOVERY, Charge, Finding
from common import messages
from common.errors import LedgerError, WireError
from common.files import write_bytes_atomically
from common.ledger_receipts import issuer_of

if TYPE_CHECKING:
    from client.site import Site

_SUFFIX = ".receipt"
_WITHOUT = (
    "if there is none, `flower-client ledger recover --whole-budget` starts one in which the whole budget is "
    "spent, and `--start-anew` one in which nothing is, for patients whom the other ledger never had"
)

log = logging.getLogger(__name__)


def check(ledger: Ledger | Sequence[Charge], receipt: Receipt) -> None:
    """Raise LedgerError when the ledger is not the receipt's, grown since; a recovery makes good for it."""
    charges = ledger.charges() if isinstance(ledger, Ledger) else ledger
    if is_covered(charges, receipt):
        return
    if len(charges) < receipt.number:
        missing = f"{receipt.number - len(charges)} charge(s) are missing that a receipt proves"
    elif receipt.number and charges[receipt.number - 1].hash != receipt.head:
        missing = f"charge {receipt.number} is another one than a receipt proves: the ledger has forked"
    elif sum(charge.sealed_sha256 is not None for charge in charges) < receipt.seals:
        missing = "answers are missing that a receipt proves to have been sealed"
    else:
        return
    raise LedgerError(
        "an older copy of the privacy ledger was put back, nothing is trained",
        why=f"{missing}; training on would forget what was spent",
        fix="stop the client and restore the newest backup of the ledger, or go on from this one with "
        "`flower-client ledger recover`, which charges what is missing to all patients",
    )


def is_covered(charges: Iterable[Charge], receipt: Receipt) -> bool:
    """Whether a recovery has charged what this receipt proves, or one that came after it."""
    for charge in charges:
        if (
            charge.purpose == RECOVERY
            and charge.plan_digest
            and charge.key.round_number >= receipt.number > 0
        ):
            covered = covered_heads(charge.plan_digest)
            if covered.get(receipt.number) == receipt.head[:HEAD_DIGITS]:
                return True
    return False


class KeptReceipts:
    """The receipts in a study's state folder: the newest, and those that the ledger does not bear out."""

    def __init__(self, state_folder: Path, site_key: bytes) -> None:
        self.folder = state_folder / "receipts"
        self._site_key = site_key
        self._own = f"{ledger_id(site_key).hex()}-"

    def all(self) -> list[Receipt]:
        """Every readable receipt of this ledger."""
        found = [read(self._site_key, path.read_bytes()) for path in self._files()]
        if None in found:
            log.warning("a receipt in %s is damaged and says nothing", self.folder)
        return [receipt for receipt in found if receipt is not None]

    def of_others(self) -> list[Path]:
        """Receipts that another ledger issued while this hospital used it."""
        return [path for path in self.folder.glob(f"*{_SUFFIX}") if not path.name.startswith(self._own)]

    def add(self, receipt: Receipt, content: bytes) -> None:
        """Keep one, durably, 0600."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"{self._own}{receipt.number:09d}-{receipt.head[:HEAD_DIGITS]}{_SUFFIX}"
        write_bytes_atomically(self.folder / name, content, mode=0o600)

    def remember(self, receipt: Receipt, content: bytes) -> None:
        """Keep one that a server echoed, unless one at hand says as much of the same ledger."""
        same = (one for one in self.all() if (one.number, one.head) == (receipt.number, receipt.head))
        if all(one.seals < receipt.seals for one in same):
            self.add(receipt, content)

    def issue(self, ledger: Ledger) -> bytes:
        """Make a receipt of the ledger and keep it; drop those that this ledger bears out."""
        content = issue(ledger)
        newest = read(self._site_key, content)
        if newest is None:
            raise LedgerError("a receipt of the ledger cannot be read back", fix="try again")
        self.add(newest, content)
        for path in self._files():
            one = read(self._site_key, path.read_bytes())
            if one is not None and (one.number, one.head) != (newest.number, newest.head):
                with suppress(LedgerError):  # what it does not bear out stays, for a recovery
                    check(ledger, one)
                    path.unlink(missing_ok=True)
        return content

    @property
    def are_foreign(self) -> bool:
        """Whether only another ledger's receipts are here: the one in use did not make them."""
        return bool(self.of_others()) and not self._files()

    def require_own(self) -> None:
        """Raise LedgerError where the hospital has used another ledger before."""
        if self.are_foreign:
            raise LedgerError(
                "this is not the ledger that this hospital has used, nothing is trained",
                why=f"{self.folder} holds receipts of another ledger, with another site.key",
                fix=f"name the right folder in site.ledger or restore its newest backup; {_WITHOUT}",
            )

    def set_others_aside(self, name: str) -> None:
        """Move other ledgers' receipts into the folder `name` beside them, where they refuse nothing."""
        for path in self.of_others():
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)
            path.rename(self.folder / name / path.name)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self._own}*{_SUFFIX}"))


def lost_folder() -> str:
    """A new name for what is set aside."""
    return f"{time.strftime('lost-%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def receipts_in(state_folder: Path) -> list[Path]:
    """All receipts that are kept, whichever ledger issued them."""
    return sorted((state_folder / "receipts").glob(f"*{_SUFFIX}"))


def receipt_findings(state_folder: Path, ledger: Ledger) -> list[Finding]:
    """What the kept receipts say against the ledger; empty when they bear it out."""
    kept, found = KeptReceipts(state_folder, ledger.site_key), []
    checks: list[Callable[[], None]] = [kept.require_own]
    for question in checks + [partial(check, ledger, receipt) for receipt in kept.all()]:
        try:
            question()
        except LedgerError as error:
            found.append(Finding(kind="receipt", message=f"{error.what}: {error.why}"))
    return found


def require_current(site: "Site", request: Message) -> None:
    """Hold the ledger against the receipts that are kept here and the one that the server echoes.

    Raises LedgerError when an older copy was put back, or where no receipt of this ledger is at hand and the
    server holds one of another: then the old ledger may have been lost. Nothing is noted of that. What is
    forged or misshapen is ignored: a server can stop nothing with it but its own training.
    """
    kept = KeptReceipts(site.state_folder, site.ledger.site_key)
    kept.require_own()
    receipts = kept.all()
    try:
        content = messages.receipt_of(request.content)
    except WireError:
        content = b"misshapen"
    echoed = read(site.ledger.site_key, content) if content else None
    if content and echoed is None:
        if not receipts:
            _require_no_other(content, site.ledger)
        log.warning("the server echoed a receipt that is not this ledger's; it is ignored")
    newest = max(((one.number, one.seals) for one in receipts), default=(0, 0))
    for receipt in receipts:
        check(site.ledger, receipt)
    if echoed is not None:
        try:
            check(site.ledger, echoed)
        except LedgerError:
            kept.remember(echoed, content)
            raise
        if (echoed.number, echoed.seals) > newest:
            kept.remember(echoed, content)


def _require_no_other(content: bytes, ledger: Ledger) -> None:
    if issuer_of(content) not in (None, ledger_id(ledger.site_key)):
        raise LedgerError(
            "the server holds a receipt of another ledger of this hospital, nothing is trained",
            why="the ledger that issued it may have been lost; training would forget what was spent",
            fix=f"restore the newest backup of that ledger; {_WITHOUT}",
        )


def issued(site: "Site") -> bytes:
    """Make a receipt of the ledger as it is now and keep it here; give it to whoever is answered.

    Called once after the charge, so that no answer is formed whose charge no receipt holds, and once after
    the answer is sealed.
    """
    return KeptReceipts(site.state_folder, site.ledger.site_key).issue(site.ledger)
