"""Going on with this ledger although there was another: a person says that it never had these patients.

What is written is a receipt of this ledger in the state folder. With it at hand the ledger is the one in use,
and receipts of others are ignored, as in every hospital that has trained before.
"""

from client.deployment.hospital_folder import HospitalFolder
from client.ledger.ledger import Ledger
from client.ledger.receipts import KeptReceipts, check, lost_folder
from client.retention import while_no_client_runs
from client.site_lock import site_lock
from common.errors import LedgerError


def is_in_use(hospital: HospitalFolder) -> bool:
    """Whether receipts here say already that this ledger is the hospital's.

    Raises LedgerError when it is damaged, missing, or an older copy: that is a case for a recovery.
    """
    ledger = _ledger(hospital)
    receipts = KeptReceipts(hospital.state, ledger.site_key).all()
    for receipt in receipts:
        check(ledger, receipt)
    return bool(receipts)


def start_anew(hospital: HospitalFolder) -> Ledger:
    """Take this ledger into use; receipts of others that lie here are set aside."""
    with while_no_client_runs(hospital.state) as is_alone, site_lock(hospital.state):
        if not is_alone:
            raise LedgerError("the client is running", fix="stop it, then try again")
        is_in_use(hospital)
        ledger = _ledger(hospital)
        kept = KeptReceipts(hospital.state, ledger.site_key)
        kept.set_others_aside(lost_folder())
        kept.issue(ledger)
    return ledger


def _ledger(hospital: HospitalFolder) -> Ledger:
    return Ledger.open(hospital.config.ledger_folder(hospital.path), create=False)
