"""Going on from a backup of the ledger, or from none: what was lost is charged to every patient.

Guarantee: afterwards the ledger is at or above what the newest receipt at hand proves, for every patient,
known or to come; with composition `site` exactly there, up to 512 lost charges. The chain stays append-only,
nothing is taken out.

Where a ledger cannot be used at all (site.key lost, damaged, gone), its files are set aside and a new one
takes their place. Without any receipt only the whole budget is certainly enough: then nothing private fits
any more until somebody raises policy.epsilon.

Round keys of lost charges: an answer that is still in the outbox is sent again as it is; without one the
round is charged anew. A charge whose answer is gone is closed: no second answer is ever formed on it.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.deployment.hospital_folder import HospitalFolder
from client.ledger.ledger import Ledger
from client.ledger.receipt import (
    HEAD_DIGITS,
    Receipt,
    common_charges,
    covers_in_words,
    events_of,
    kinds_of,
    read,
)
from client.ledger.receipts import KeptReceipts, check, lost_folder
from client.ledger.records import OUTBOX, RECOVERY, Charge, DamagedLedgerError
from client.outbox import Outbox
from client.retention import while_no_client_runs
from client.site_lock import site_lock
from common.errors import ConfigError, LedgerError
from common.privacy.accountant import epsilon, merge
from common.privacy.plan import PrivacyEvent

_KEY_BYTES = 32
_MOST_EXACT = 500.0

Lost = tuple[Receipt, tuple[PrivacyEvent | None, ...]]
"""A receipt that the ledger does not bear out, and the events that it proves beyond the ledger."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What would be charged to everybody; `carry_out` does it."""

    folder: Path
    """The ledger's."""
    problem: str
    """Why the ledger cannot be used as it is; empty when it can."""
    key: bytes
    """The site's key, empty when it is lost."""
    charges: int
    """In the ledger as it is now; 0 for an unusable one."""
    receipts: int
    """At hand and readable."""
    lost: tuple[Lost, ...]
    whole_budget: PrivacyEvent | None
    delta: float

    @property
    def is_needed(self) -> bool:
        """Whether anything is to be charged or replaced."""
        return bool(self.problem or self.lost or self.whole_budget)

    @property
    def events(self) -> list[PrivacyEvent | None]:
        """All that would be charged."""
        proven = [event for _, events in self.lost for event in events]
        return proven + ([self.whole_budget] if self.whole_budget else [])

    def in_words(self) -> str:
        """What is there, what is missing, and what would be done."""
        lines = [
            f"{self.folder}: {self.problem}" if self.problem else f"{self.folder}: {self.charges} charge(s)",
            f"receipts at hand: {self.receipts}, of which the ledger does not bear out {len(self.lost)}",
        ]
        for receipt, events in self.lost:
            lines.append(
                f"  a receipt proves {receipt.number} charge(s) and {receipt.seals} sealed answer(s); "
                f"beyond this ledger {_cost_in_words(events, self.delta)}"
            )
        if self.whole_budget:
            lines.append(f"at least the whole budget: {_cost_in_words([self.whole_budget], self.delta)}")
        if self.problem:
            lines.append("the unusable files are set aside, and a new ledger takes their place")
        return "\n".join(lines)


def plan_recovery(
    hospital: HospitalFolder, *, further: Sequence[bytes] = (), whole_budget: bool = False
) -> Recovery:
    """See what is there and what the receipts prove, those kept here and `further` ones; writes nothing.

    Raises LedgerError where no receipt tells what is missing and the whole budget is not to be charged,
    ConfigError for a further receipt that this ledger's key does not open.
    """
    folder = hospital.config.ledger_folder(hospital.path)
    key, charges, problem = _found(folder)
    receipts: list[Receipt] = []
    if key:
        receipts = KeptReceipts(hospital.state, key).all()
        receipts += [_readable(key, content) for content in further]
    unknown = problem
    if key and not problem and KeptReceipts(hospital.state, key).are_foreign and not receipts:
        unknown = f"this hospital has used another ledger than the one in {folder}"
    if unknown and not receipts and not whole_budget:
        raise LedgerError(
            "nothing tells what was spent",
            why=f"{unknown}; {'no receipt is at hand' if key else 'without site.key no receipt can be read'}",
            fix="restore the newest backup"
            + (", ask the operator for the newest receipt (--receipt FILE)" if key and problem else "")
            + ", or charge all that the policy allows and a little more: --whole-budget",
        )
    budget = _whole_budget(hospital.config.policy.epsilon, hospital.config.delta) if whole_budget else None
    return Recovery(
        folder=folder,
        problem=problem,
        key=key,
        charges=len(charges),
        receipts=len(receipts),
        lost=tuple((receipt, lost_events(charges, receipt)) for receipt in _not_borne_out(charges, receipts)),
        whole_budget=budget,
        delta=hospital.config.delta,
    )


def carry_out(recovery: Recovery, hospital: HospitalFolder) -> Ledger:
    """Charge it, and keep a receipt of the ledger as it then is.

    Raises LedgerError when it changed since, or while the client runs: a worker knows the old ledger's key.
    """
    with while_no_client_runs(hospital.state) as is_alone, site_lock(hospital.state):
        if not is_alone:
            raise LedgerError("the client is running", fix="stop it, then try again")
        key, charges, _ = _found(recovery.folder)
        if (key, len(charges)) != (recovery.key, recovery.charges):
            raise LedgerError("the ledger has changed meanwhile", fix="stop the client, then try again")
        stamp = lost_folder()
        if recovery.problem:
            _replace(recovery, stamp)
            ledger = Ledger.open(recovery.folder, create=False)
        else:
            ledger = Ledger.open(recovery.folder, create=False)
            _charge(ledger, recovery, _answers(charges, Outbox(hospital.state / "outbox")))
        kept = KeptReceipts(hospital.state, ledger.site_key)
        kept.set_others_aside(stamp)
        kept.issue(ledger)
    return ledger


def lost_events(charges: Sequence[Charge], receipt: Receipt) -> tuple[PrivacyEvent | None, ...]:
    """What the receipt proves beyond what the ledger has of it; None: training without privacy.

    The ledger has the charges that both share, and what a recovery up to an earlier receipt of the same lost
    ledger made good.
    """
    shared = common_charges(charges, receipt)
    have = [*charges[:shared], *(c for c in charges[shared:] if _makes_good(c, receipt))]
    steps = {(q, sigma): count for q, sigma, count in kinds_of(have)}
    rest = [(q, sigma, count - steps.get((q, sigma), 0)) for q, sigma, count in receipt.kinds]
    events: list[PrivacyEvent | None] = list(
        events_of(merge(events_of(tuple(kind for kind in rest if kind[2] > 0)) + events_of(receipt.bounded)))
    )
    if receipt.not_private > sum(not charge.claims_privacy for charge in have):
        events.append(None)
    return tuple(events)


def _makes_good(charge: Charge, receipt: Receipt) -> bool:
    """Whether a charge is part of a recovery up to a receipt that came before this one."""
    head = receipt.heads.get(charge.key.round_number)
    return charge.purpose == RECOVERY and head == charge.key.model_hash[:HEAD_DIGITS]


def _found(folder: Path) -> tuple[bytes, tuple[Charge, ...], str]:
    """The site's key, the charges, and why the ledger cannot be used (empty when it can).

    One that is in use by others, or of another release, is no case for a recovery: LedgerError.
    """
    try:
        ledger = Ledger.examine(folder)
        if damage := ledger.damage():
            raise DamagedLedgerError(damage[0].message)
        return ledger.site_key, ledger.charges(), ""
    except DamagedLedgerError as error:
        key_file = folder / "site.key"
        key = key_file.read_bytes() if key_file.is_file() else b""
        return key if len(key) == _KEY_BYTES else b"", (), error.why or error.what


def _not_borne_out(charges: Sequence[Charge], receipts: Sequence[Receipt]) -> list[Receipt]:
    """Receipts that show something lost, without those that a later one of the same ledger contains."""
    missing: list[Receipt] = []
    for receipt in sorted(receipts, key=lambda one: (one.number, one.seals), reverse=True):
        try:
            check(charges, receipt)
        except LedgerError:
            if not any(later.contains(receipt) for later in missing):
                missing.append(receipt)
    return missing


def _charge(ledger: Ledger, recovery: Recovery, answers: dict[int, str]) -> None:
    recipient = OUTBOX if recovery.receipts or recovery.whole_budget else ""
    for receipt, events in recovery.lost:
        ledger.charge_everybody(
            events,
            delta=recovery.delta,
            up_to=receipt.number,
            head=receipt.head,
            covers=covers_in_words(receipt),
            recipient=recipient,
            answers=answers,
        )
    if recovery.whole_budget:
        ledger.charge_everybody(
            [recovery.whole_budget], delta=recovery.delta, recipient=recipient, answers=answers
        )


def _answers(charges: Sequence[Charge], outbox: Outbox) -> dict[int, str]:
    """Hash of the answer that waits in the outbox, by the number of its charge that is not sealed yet."""
    found = {}
    for charge in charges:
        if charge.sealed_sha256 is None and charge.purpose != RECOVERY:
            answer = outbox.find(charge.key, purpose=charge.purpose)
            if answer is not None:
                found[charge.number] = answer.digest
    return found


def _replace(recovery: Recovery, stamp: str) -> None:
    """Put a new, charged ledger in the place of an unusable one; killed anywhere, the folder is refused."""
    folder = recovery.folder
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        new = Ledger.examine(Path(aside) / "ledger", create=True, key=recovery.key)
        _charge(new, recovery, {})
        with site_lock(folder, name="ledger.lock"):
            old = folder / stamp
            old.mkdir(mode=0o700)
            for path in [path for path in folder.iterdir() if path.is_file() and path.suffix != ".lock"]:
                shutil.copy2(path, old / path.name)
            (folder / "ledger.sqlite-journal").unlink(missing_ok=True)
            # The key comes last: until then the folder is one that lacks its key or does not fit it.
            for name in ("ledger.sqlite", "head.json", "site.key"):
                os.replace(new.folder / name, folder / name)


def _whole_budget(limit: float, delta: float) -> PrivacyEvent:
    """One event that costs a thousandth more than the budget.

    The Gaussian mechanism's exact delta (Balle and Wang 2018, arXiv 1805.06530, theorem 8) falls with the
    noise. Example: limit 8, delta 1e-4 give noise multiplier 0.55.
    """
    bound = limit * 1.001
    little, much = 1 / math.sqrt(2 * bound), 1e6
    if bound > _MOST_EXACT:  # exp overflows; this much noise costs more than the limit at any delta below 1/2
        return PrivacyEvent(sampling_rate=1, noise_multiplier=little, steps=1)
    for _ in range(100):
        noise = math.sqrt(little * much)
        needed = _tail(bound * noise - 0.5 / noise) - math.exp(bound) * _tail(bound * noise + 0.5 / noise)
        little, much = (noise, much) if needed > delta else (little, noise)
    return PrivacyEvent(sampling_rate=1, noise_multiplier=little, steps=1)


def _tail(x: float) -> float:
    """Probability that a standard normal exceeds x."""
    return math.erfc(x / math.sqrt(2)) / 2


def _readable(key: bytes, content: bytes) -> Receipt:
    receipt = read(key, content)
    if receipt is None:
        raise ConfigError(
            "that file is no receipt of this ledger",
            why="its seal does not open with this site.key: it is another hospital's, or was changed",
            fix="ask the operator for this hospital's file in the folder receipts",
        )
    return receipt


def _cost_in_words(events: Sequence[PrivacyEvent | None], delta: float) -> str:
    private = [event for event in events if event is not None]
    words = f"epsilon {epsilon(private, delta=delta):.4g} at delta {delta:.3g} to every patient"
    return words + (", and training without privacy" if len(private) < len(events) else "")
