"""What the kept receipts say against the ledger, for whoever plans with it, shows it or signs it.

Training looks by itself (`client.ledger.receipts.require_current`); here nothing is asked of a server.
"""

from pathlib import Path

from client.ledger.ledger import Ledger
from client.ledger.receipts import KeptReceipts, check, receipts_in
from common.errors import LedgerError


def has_ledger(folder: Path) -> bool:
    """Whether anything of a ledger is in this folder."""
    return folder.is_dir() and any(folder.iterdir())


def require_not_gone(folder: Path, state_folder: Path) -> None:
    """Raise LedgerError where receipts are kept and the ledger that issued them is not in `folder`.

    No receipt can be read without the ledger's key, so only the whole budget is certainly enough then.
    """
    if not has_ledger(folder) and receipts_in(state_folder):
        raise LedgerError(
            f"the ledger that this hospital has used is not in {folder}, nothing is trained",
            why=f"its receipts are in {state_folder / 'receipts'}, and cannot be read without its site.key",
            fix="name the right folder in site.ledger or restore its newest backup; if there is none, "
            "`flower-client ledger recover --whole-budget` starts one in which the whole budget is spent",
        )


def contradiction(ledger: Ledger, state_folder: Path) -> LedgerError | None:
    """The first thing that the kept receipts say against the ledger; None where they bear it out."""
    kept = KeptReceipts(state_folder, ledger.site_key)
    try:
        kept.require_own()
        for receipt in kept.all():
            check(ledger, receipt)
    except LedgerError as error:
        return error
    return None


def require_borne_out(ledger: Ledger, state_folder: Path) -> None:
    """Raise LedgerError where the kept receipts contradict the ledger."""
    if (error := contradiction(ledger, state_folder)) is not None:
        raise error
