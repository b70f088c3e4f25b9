"""The hospital's privacy ledger: every event that patients went through, for ever, over all studies.

Guarantee: a charge is on disk before `charge` returns, a round key is charged once, and the cost that is
reported is the worst patient's over all events of all cohorts that hold them, whatever the run or the server.
Nothing here leaves the hospital but a charge's own event and its run's epsilon.
"""

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from sqlite3 import Connection

from client.ledger.costs import all_spent, cost_of_charge, lines_behind
from client.ledger.records import (
    EVERYBODY,
    LOST,
    OUTBOX,
    RECOVERY,
    RECOVERY_RUN,
    TRAINING,
    Charge,
    Cohort,
    Composition,
    Finding,
    History,
    Spent,
    worst_histories,
)
from client.ledger.rows import (
    add_cohort,
    charge_columns,
    find_charge,
    find_conflict,
    now,
    read_charges,
    read_cohorts,
)
from client.ledger.store import LedgerStore
from common.errors import LedgerError, Refusal, RefusalCode
from common.messages import RoundKey
from common.privacy.plan import PrivacyEvent, Unit

_ALL_PATIENTS = Cohort(digest=EVERYBODY, hashes=frozenset())


class Ledger:
    """One hospital's ledger; safe to share between threads, forks and processes."""

    def __init__(self, store: LedgerStore, site_key: bytes) -> None:
        self._store = store
        self._site_key = site_key

    @classmethod
    def open(cls, folder: Path, *, create: bool = True) -> "Ledger":
        """Open the ledger in `folder`, or make an empty one where none ever was.

        Raises LedgerError when it is damaged, altered, shortened, or partly missing.
        """
        ledger = cls.examine(folder, create=create)
        ledger._store.require_intact()
        return ledger

    @classmethod
    def examine(cls, folder: Path, *, create: bool = False, key: bytes = b"") -> "Ledger":
        """Open without checking the content, for `verify`; LedgerError only where nothing is readable."""
        store = LedgerStore(folder)
        return cls(store, store.prepare(create=create, key=key))

    @property
    def folder(self) -> Path:
        """Where the ledger lives."""
        return self._store.folder

    @property
    def site_key(self) -> bytes:
        """32 secret bytes of this hospital, for keyed hashes; never leaves."""
        return self._site_key

    def cohort(self, unit_ids: Iterable[str]) -> Cohort:
        """The patients of these ids as keyed hashes; the same id gives the same hash in every study."""
        return Cohort.of(
            hmac.new(self._site_key, b"unit\0" + unit.encode(), hashlib.sha256).digest() for unit in unit_ids
        )

    def find(self, key: RoundKey, *, purpose: str = TRAINING) -> Charge | None:
        """The charge of this round key, if there is one."""
        with self._store.reading() as connection:
            return find_charge(connection, key, purpose)

    def conflict(self, key: RoundKey, *, purpose: str = TRAINING) -> Charge | None:
        """A charge of the same run, attempt and round for another model, if there is one."""
        with self._store.reading() as connection:
            return find_conflict(connection, key, purpose)

    def charge(
        self,
        key: RoundKey,
        *,
        event: PrivacyEvent | None,
        cohort: Cohort,
        delta: float,
        unit: Unit = "patient",
        l2_clip_norm: float | None = None,
        claims_privacy: bool = True,
        limit: float | None = None,
        purpose: str = TRAINING,
        recipient: str = "",
        plan_digest: str = "",
        composition: Composition = "patient",
    ) -> Charge:
        """Write down what is about to be done and wait for the disk; the same key gives the same charge.

        `event` None is training without privacy. `limit` is the epsilon that the worst patient of the cohort
        (composition `site`: a patient who was in every charge of the ledger) may reach, checked in the same
        transaction. Raises BudgetError above it, Refusal(CONFLICT) when the round was charged for another
        model, LedgerError when it was charged for another event or cohort.
        """
        claims_privacy = claims_privacy and event is not None
        with self._store.writing() as connection:
            existing = find_charge(connection, key, purpose)
            if existing is not None:
                return _same(existing, event, cohort, claims_privacy=claims_privacy)
            if find_conflict(connection, key, purpose) is not None:
                raise Refusal(RefusalCode.CONFLICT, f"round {key.round_number} was charged for another model")
            cost = cost_of_charge(
                read_charges(connection),
                read_cohorts(connection),
                run_id=key.run_id,
                event=event,
                cohort=cohort,
                delta=delta,
                limit=limit,
                claims_privacy=claims_privacy,
                composition=composition,
                purpose=purpose,
            )
            row = charge_columns(
                key,
                purpose=purpose,
                cohort=cohort,
                event=event,
                delta=delta,
                epsilon=cost,
                unit=unit,
                l2_clip_norm=l2_clip_norm,
                recipient=recipient,
                plan_digest=plan_digest,
            )
            add_cohort(connection, cohort)
            self._store.append(connection, "charges", row)
            charged = find_charge(connection, key, purpose)
        if charged is None:
            raise LedgerError("the charge could not be read back", fix="check the ledger's disk")
        return charged

    def charge_everybody(
        self,
        events: Sequence[PrivacyEvent | None],
        *,
        delta: float,
        up_to: int = 0,
        head: str = "",
        covers: str = "",
        recipient: str = "",
        answers: Mapping[int, str] | None = None,
    ) -> None:
        """Charge what was lost with an older ledger to every patient, known or to come, in one transaction.

        The first row costs nothing and tells what the recovery goes up to: charge number `up_to` of the lost
        ledger, that charge's hash `head`, and the other heads that it `covers`; then one row for each event
        (None: training without privacy). Charges without an answer are sealed with the hash in `answers` (by
        charge number), or as LOST: an old charge is never answered anew (`client.ledger.recovery`).
        """
        nothing = PrivacyEvent(sampling_rate=1, noise_multiplier=1, steps=0)
        with self._store.writing() as connection:
            add_cohort(connection, _ALL_PATIENTS)
            before = read_charges(connection)
            for charge in before:
                if charge.sealed_sha256 is None and charge.purpose != RECOVERY:
                    self._seal(connection, charge, (answers or {}).get(charge.number, LOST))
            attempt = sum(charge.purpose == RECOVERY for charge in before)
            for event in (nothing, *events):
                attempt += 1
                key = RoundKey(run_id=RECOVERY_RUN, attempt=attempt, round_number=up_to, model_hash=head)
                charges, cohorts = read_charges(connection), read_cohorts(connection)
                row = charge_columns(
                    key,
                    purpose=RECOVERY,
                    cohort=_ALL_PATIENTS,
                    event=event,
                    delta=delta,
                    epsilon=cost_of_charge(
                        charges,
                        cohorts,
                        run_id=RECOVERY_RUN,
                        event=event,
                        cohort=_ALL_PATIENTS,
                        delta=delta,
                        purpose=RECOVERY,
                    ),
                    recipient=recipient,
                    plan_digest=covers if event is nothing else "",
                )
                self._store.append(connection, "charges", row)

    def mark_sealed(self, key: RoundKey, sha256: str, *, purpose: str = TRAINING) -> None:
        """Note the hash of the answer under this charge; the same hash again changes nothing.

        An answer whose charge went down with an older ledger was paid for by the recovery (`OUTBOX`).
        """
        with self._store.writing() as connection:
            charge = find_charge(connection, key, purpose)
            if charge is None:
                if read_charges(connection, purpose=RECOVERY, recipient=OUTBOX):
                    return
                raise LedgerError("an answer without a charge", fix="charge the round before training")
            if charge.sealed_sha256 is None:
                self._seal(connection, charge, sha256)
            elif charge.sealed_sha256 != sha256:
                raise LedgerError(
                    f"round {key.round_number} already has another sealed answer",
                    why="one charge pays for one update",
                    fix="send the sealed answer again",
                )

    def _seal(self, connection: Connection, charge: Charge, sha256: str) -> None:
        self._store.append(connection, "seals", {"charge": charge.number, "sha256": sha256, "time": now()})

    def charges(self) -> tuple[Charge, ...]:
        """All charges in order."""
        with self._store.reading() as connection:
            return tuple(read_charges(connection))

    def histories(
        self,
        cohort: Cohort,
        *,
        rehearsed_run: str | None = None,
        composition: Composition = "patient",
        run_id: str = "",
    ) -> list[History]:
        """What the patients of `cohort` have behind them: the distinct worst lists of events, [()] for none.

        Composition `site` gives one list, of everything that was ever charged: which patients the cohort
        holds then decides nothing. Training that claims no privacy does not count, except that of
        `rehearsed_run`: a reproducible run takes the decisions that the private one would. Evaluations of
        run `run_id` count for their own patients (`lines_behind`).
        """
        with self._store.reading() as connection:
            charges = read_charges(connection)
            lines = lines_behind(charges, composition, run_id=run_id, rehearsed_run=rehearsed_run)
            return worst_histories(lines, read_cohorts(connection), cohort.hashes)

    def spent(self, delta: float) -> Spent:
        """What the worst patient of the whole site has spent at `delta`, and each run's share on its own."""
        with self._store.reading() as connection:
            charges, cohorts = read_charges(connection), read_cohorts(connection)
        return all_spent(charges, cohorts, delta=delta)

    def damage(self) -> list[Finding]:
        """What is not as it was written, costs not recomputed; writes nothing. Empty when it is right."""
        with self._store.examining() as connection:
            return self._store.problems(connection)

    def verify(self) -> list[Finding]:
        """Recompute everything the ledger says (`client.ledger.verify`); empty when it is right."""
        from client.ledger.verify import content_findings

        with self._store.examining() as connection:
            found = self._store.problems(connection)
            if any(finding.kind == "file" for finding in found):
                return found
            try:
                charges, cohorts = read_charges(connection), read_cohorts(connection)
            except ValueError as error:
                return [*found, Finding(kind="chain", message=f"a line holds impossible values ({error})")]
        return found + content_findings(charges, cohorts)


def _same(stored: Charge, event: PrivacyEvent | None, cohort: Cohort, *, claims_privacy: bool) -> Charge:
    """The stored charge, if it paid for exactly this."""
    what = (
        "the event"
        if stored.event != event
        else "the patients"
        if stored.cohort_digest != cohort.digest
        else ""
    )
    if what or stored.claims_privacy != claims_privacy:
        raise LedgerError(
            f"round {stored.key.round_number} is charged, and {what or 'its privacy claim'} changed since",
            why="a charge pays for one event on one set of patients",
            fix="leave this round out; the next one is charged anew",
        )
    return stored
