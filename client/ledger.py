"""The hospital's privacy ledger: every event that patients went through, for ever, over all studies.

Guarantee: a charge is on disk before `charge` returns, a round key is charged once, and the cost that is
reported is the worst patient's over all events of all cohorts that hold them, whatever the run or the server.
Nothing here leaves the hospital but a charge's own event and its run's epsilon.
"""

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import Connection

from client.budget_words import budget_error
from client.ledger_records import Charge, Cohort, Finding, History, RunSpent, Spent, worst_histories
from client.ledger_rows import (
    counted_lines,
    find_charge,
    find_conflict,
    key_columns,
    read_charges,
    read_cohorts,
)
from client.ledger_store import LedgerStore
from common.errors import LedgerError, Refusal, RefusalCode
from common.messages import RoundKey
from common.privacy.accountant import epsilon, fits, running_epsilon
from common.privacy.plan import PrivacyEvent, Unit

TRAINING = "training"


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
    def examine(cls, folder: Path, *, create: bool = False) -> "Ledger":
        """Open without checking the content, for `verify`; LedgerError only where nothing is readable."""
        store = LedgerStore(folder)
        return cls(store, store.prepare(create=create))

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
    ) -> Charge:
        """Write down what is about to be done and wait for the disk; the same key gives the same charge.

        `event` None is training without privacy. `limit` is the epsilon that the worst patient of the cohort
        may reach, checked in the same transaction. Raises BudgetError above it, Refusal(CONFLICT) when the
        round was charged for another model, LedgerError when it was charged for another event or cohort.
        """
        claims_privacy = claims_privacy and event is not None
        with self._store.writing() as connection:
            existing = find_charge(connection, key, purpose)
            if existing is not None:
                return _same(existing, event, cohort, claims_privacy=claims_privacy)
            if find_conflict(connection, key, purpose) is not None:
                raise Refusal(RefusalCode.CONFLICT, f"round {key.round_number} was charged for another model")
            cost = _cost(connection, key, event, cohort, delta, limit, claims_privacy=claims_privacy)
            row = {
                **key_columns(key),
                "purpose": purpose,
                "cohort": cohort.digest,
                "sampling_rate": float(event.sampling_rate) if event else None,
                "noise_multiplier": float(event.noise_multiplier) if event else None,
                "steps": int(event.steps) if event else None,
                "l2_clip_norm": None if l2_clip_norm is None else float(l2_clip_norm),
                "unit": unit,
                "delta": float(delta),
                "claims_privacy": int(claims_privacy),
                "epsilon": cost,
                "recipient": recipient,
                "plan_digest": plan_digest,
                "time": _now(),
            }
            connection.execute(
                "INSERT OR IGNORE INTO cohorts (digest, size, members) VALUES (?, ?, ?)",
                (cohort.digest, cohort.size, b"".join(sorted(cohort.hashes))),
            )
            self._store.append(connection, "charges", row)
            charged = find_charge(connection, key, purpose)
        if charged is None:
            raise LedgerError("the charge could not be read back", fix="check the ledger's disk")
        return charged

    def mark_sealed(self, key: RoundKey, sha256: str, *, purpose: str = TRAINING) -> None:
        """Note the hash of the answer under this charge; the same hash again changes nothing."""
        with self._store.writing() as connection:
            charge = find_charge(connection, key, purpose)
            if charge is None:
                raise LedgerError("an answer without a charge", fix="charge the round before training")
            if charge.sealed_sha256 is None:
                seal = {"charge": charge.number, "sha256": sha256, "time": _now()}
                self._store.append(connection, "seals", seal)
            elif charge.sealed_sha256 != sha256:
                raise LedgerError(
                    f"round {key.round_number} already has another sealed answer",
                    why="one charge pays for one update",
                    fix="send the sealed answer again",
                )

    def charges(self) -> tuple[Charge, ...]:
        """All charges in order."""
        with self._store.reading() as connection:
            return tuple(read_charges(connection))

    def histories(self, cohort: Cohort, *, rehearsed_run: str | None = None) -> list[History]:
        """What the patients of `cohort` have behind them: the distinct worst lists of events, [()] for none.

        Training that claims no privacy does not count, except that of `rehearsed_run`: a reproducible run
        takes the decisions that the private one would.
        """
        with self._store.reading() as connection:
            lines = counted_lines(read_charges(connection), rehearsed_run)
            return worst_histories(lines, read_cohorts(connection), cohort.hashes)

    def noise_multiplier_of(self, run_id: str) -> float | None:
        """The noise multiplier of the last charge of a run, None before its first."""
        events = [c.event for c in self.charges() if c.key.run_id == run_id and c.event is not None]
        return events[-1].noise_multiplier if events else None

    def spent(self, delta: float) -> Spent:
        """What the worst patient of the whole site has spent at `delta`, and each run's share on its own."""
        with self._store.reading() as connection:
            charges, cohorts = read_charges(connection), read_cohorts(connection)
        worst = worst_histories(counted_lines(charges), cohorts)
        touched = {charge.cohort_digest for charge in charges if not charge.claims_privacy}
        runs = dict.fromkeys(charge.key.run_id for charge in charges)
        return Spent(
            epsilon=max(epsilon(history, delta=delta) for history in worst),
            delta=delta,
            patients=len(frozenset().union(*cohorts.values())),
            not_private_patients=len(frozenset().union(*(cohorts[digest] for digest in touched))),
            runs=tuple(
                _run_spent([c for c in charges if c.key.run_id == run_id], cohorts, delta) for run_id in runs
            ),
        )

    def damage(self) -> list[Finding]:
        """What is not as it was written, costs not recomputed; writes nothing. Empty when it is right."""
        with self._store.examining() as connection:
            return self._store.problems(connection)

    def verify(self) -> list[Finding]:
        """Recompute everything the ledger says (`client.ledger_verify`); empty when it is right."""
        from client.ledger_verify import content_findings

        with self._store.examining() as connection:
            found = self._store.problems(connection)
            if any(finding.kind == "file" for finding in found):
                return found
            try:
                charges, cohorts = read_charges(connection), read_cohorts(connection)
            except ValueError as error:
                return [*found, Finding(kind="chain", message=f"a line holds impossible values ({error})")]
        return found + content_findings(charges, cohorts)


def _cost(
    connection: Connection,
    key: RoundKey,
    event: PrivacyEvent | None,
    cohort: Cohort,
    delta: float,
    limit: float | None,
    *,
    claims_privacy: bool,
) -> float | None:
    """What the run will have cost with this event, None without a claim; BudgetError above `limit`."""
    if event is None:
        return None
    charges = read_charges(connection)
    cohorts = {**read_cohorts(connection), cohort.digest: cohort.hashes}
    new = (cohort.digest, event)
    if limit is not None:
        lines = [*counted_lines(charges, None if claims_privacy else key.run_id), new]
        for history in worst_histories(lines, cohorts, cohort.hashes):
            if not fits(history, epsilon=limit, delta=delta):
                before = worst_histories(lines[:-1], cohorts, cohort.hashes)
                raise budget_error(
                    f"this round would take a patient above epsilon {limit:g}",
                    history=max(before, key=lambda events: running_epsilon(events, delta=delta)),
                    event=event,
                    limit=limit,
                    delta=delta,
                )
    if not claims_privacy:
        return None
    own = counted_lines([charge for charge in charges if charge.key.run_id == key.run_id])
    lists = worst_histories([*own, new], cohorts)
    bound = max(running_epsilon(history, delta=delta) for history in lists)
    if limit is None or bound <= limit:
        return bound
    return max(epsilon(history, delta=delta) for history in lists)


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


def _run_spent(charges: Sequence[Charge], cohorts: Mapping[str, frozenset[bytes]], delta: float) -> RunSpent:
    claims = all(charge.claims_privacy for charge in charges)
    events = [charge.event for charge in charges if charge.event is not None]
    lists = worst_histories(counted_lines(charges), cohorts)
    return RunSpent(
        run_id=charges[0].key.run_id,
        rounds=len({charge.key.round_number for charge in charges}),
        steps=sum(event.steps for event in events),
        noise_multiplier=events[-1].noise_multiplier if events else None,
        epsilon=max(epsilon(history, delta=delta) for history in lists) if claims else None,
        claims_privacy=claims,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
