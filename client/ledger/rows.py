"""The ledger's tables as plain values, both ways."""

from collections.abc import Sequence
from datetime import UTC, datetime
from sqlite3 import Connection
from typing import Any

from client.ledger.records import Charge, Cohort, Line
from client.ledger.store import rows_of
from common.messages import RoundKey
from common.privacy.plan import PrivacyEvent


def key_columns(key: RoundKey) -> dict[str, Any]:
    """The columns of a round key."""
    return {
        "run_id": key.run_id,
        "attempt": key.attempt,
        "round_number": key.round_number,
        "model_hash": key.model_hash,
    }


def charge_columns(
    key: RoundKey,
    *,
    purpose: str,
    cohort: Cohort,
    event: PrivacyEvent | None,
    delta: float,
    epsilon: float | None,
    unit: str = "patient",
    l2_clip_norm: float | None = None,
    recipient: str = "",
    plan_digest: str = "",
) -> dict[str, Any]:
    """The columns of a charge that is made now; privacy is claimed where there is an epsilon."""
    return {
        **key_columns(key),
        "purpose": purpose,
        "cohort": cohort.digest,
        "sampling_rate": float(event.sampling_rate) if event else None,
        "noise_multiplier": float(event.noise_multiplier) if event else None,
        "steps": int(event.steps) if event else None,
        "l2_clip_norm": None if l2_clip_norm is None else float(l2_clip_norm),
        "unit": unit,
        "delta": float(delta),
        "claims_privacy": int(epsilon is not None),
        "epsilon": epsilon,
        "recipient": recipient,
        "plan_digest": plan_digest,
        "time": now(),
    }


def add_cohort(connection: Connection, cohort: Cohort) -> None:
    """Store a cohort's members unless they are there."""
    connection.execute(
        "INSERT OR IGNORE INTO cohorts (digest, size, members) VALUES (?, ?, ?)",
        (cohort.digest, cohort.size, b"".join(sorted(cohort.hashes))),
    )


def now() -> str:
    """UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_charges(connection: Connection, **equal: str | int) -> list[Charge]:
    """Charges in order, all or those with these column values; ValueError for an impossible line."""
    seals = {row["charge"]: row["sha256"] for row in rows_of(connection, "seals")}
    return [_charge(row, seals.get(row["number"])) for row in rows_of(connection, "charges", **equal)]


def read_cohorts(connection: Connection) -> dict[str, frozenset[bytes]]:
    """Members of every cohort by its digest."""
    return {
        digest: frozenset(members[at : at + 32] for at in range(0, len(members), 32))
        for digest, members in connection.execute("SELECT digest, members FROM cohorts")
    }


def find_charge(connection: Connection, key: RoundKey, purpose: str) -> Charge | None:
    """The charge of this round key and purpose."""
    return next(iter(read_charges(connection, **key_columns(key), purpose=purpose)), None)


def find_conflict(connection: Connection, key: RoundKey, purpose: str) -> Charge | None:
    """The first charge of the same run, attempt and round for another model."""
    place = {name: value for name, value in key_columns(key).items() if name != "model_hash"}
    charges = read_charges(connection, **place, purpose=purpose)
    return next((charge for charge in charges if charge.key.model_hash != key.model_hash), None)


def counted_lines(charges: Sequence[Charge], rehearsed_run: str | None = None) -> list[Line]:
    """Event and cohort of the charges that claim privacy, and of `rehearsed_run` whatever it claims."""
    return [
        (charge.cohort_digest, charge.event)
        for charge in charges
        if charge.event is not None and (charge.claims_privacy or charge.key.run_id == rehearsed_run)
    ]


def _charge(row: dict[str, Any], sealed_sha256: str | None) -> Charge:
    event = None
    if row["sampling_rate"] is not None:
        event = PrivacyEvent(
            sampling_rate=row["sampling_rate"], noise_multiplier=row["noise_multiplier"], steps=row["steps"]
        )
    return Charge(
        number=row["number"],
        key=RoundKey(
            run_id=row["run_id"],
            attempt=row["attempt"],
            round_number=row["round_number"],
            model_hash=row["model_hash"],
        ),
        purpose=row["purpose"],
        event=event,
        claims_privacy=bool(row["claims_privacy"]),
        epsilon=row["epsilon"],
        delta=row["delta"],
        l2_clip_norm=row["l2_clip_norm"],
        unit=row["unit"],
        cohort_digest=row["cohort"],
        recipient=row["recipient"],
        plan_digest=row["plan_digest"],
        time=row["time"],
        hash=row["hash"],
        sealed_sha256=sealed_sha256,
    )
