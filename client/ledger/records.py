"""What the ledger holds, as plain values, and the composition over patients.

A charge is an event applied to a cohort: the set of patients that could have entered it. A patient's history
is the list of events of all cohorts that hold them; what was spent is the cost of the worst history.
Sizes and cohorts are private: nothing here leaves the hospital.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from common.errors import LedgerError
from common.messages import RoundKey
from common.privacy.accountant import Kinds, merge
from common.privacy.plan import PrivacyEvent

History = tuple[PrivacyEvent, ...]
Line = tuple[str, PrivacyEvent]
"""An event and the digest of the cohort that went through it."""
Composition = Literal["site", "patient"]
"""Whose events add up: `site`, all of the ledger for everybody; `patient`, those of a patient's cohorts."""

TRAINING, EVALUATION, RECOVERY = "training", "evaluation", "recovery"
EVERYBODY = "everybody"
"""In place of a cohort's digest: every patient, known or to come. A release that does not know the word takes
the ledger for damaged and trains nothing."""
RECOVERY_RUN = "(recovery)"
"""Run of the charges of `client.ledger.recovery`; no server can name it, the wire allows no parenthesis."""
OUTBOX = "answers in the outbox"
"""Recipient of a recovery that also paid for every answer that was waiting in the outbox."""
LOST = "0" * 64
"""Seal of a charge whose answer went down with an older ledger: nothing is formed on that charge again."""


class DamagedLedgerError(LedgerError):
    """The ledger's files are damaged, altered, shortened or partly gone."""


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """A set of units (patients) as keyed hashes."""

    digest: str
    """SHA-256 over the sorted hashes."""
    hashes: frozenset[bytes] = field(repr=False)
    """HMAC-SHA-256 of each unit id under the site's key."""

    @classmethod
    def of(cls, hashes: Iterable[bytes]) -> "Cohort":
        """The cohort of these keyed hashes."""
        members = frozenset(hashes)
        return cls(digest=hashlib.sha256(b"".join(sorted(members))).hexdigest(), hashes=members)

    @property
    def size(self) -> int:
        """Number of units; private."""
        return len(self.hashes)


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One line of the ledger: what was (about to be) done to whom."""

    number: int
    """1, 2, 3 ... in the order of charging."""
    key: RoundKey
    purpose: str
    """`training`; `evaluation`: counts about validation patients; `recovery`: charges that were lost."""
    event: PrivacyEvent | None
    """None: training without privacy."""
    claims_privacy: bool
    """False for training without privacy and for reproducible runs, whose noise others could recompute."""
    epsilon: float | None
    """What this run was said to have cost after this charge, at `delta`, to the worst of those that it had
    for `purpose`; None where nothing is claimed."""
    delta: float
    l2_clip_norm: float | None
    unit: str
    """Who is protected: patient or image."""
    cohort_digest: str
    recipient: str
    """To whom the answer goes, as far as the hospital knows."""
    plan_digest: str
    """Of the plan that was agreed; for a recovery the heads of the lost ledger that it covers."""
    time: str
    """UTC, ISO 8601."""
    hash: str
    """SHA-256 over this line and the one before."""
    sealed_sha256: str | None
    """Hash of the answer that was sealed under this charge; None until there is one, `LOST` if it is gone."""


@dataclass(frozen=True, kw_only=True)
class RunSpent:
    """What one federation run has cost its worst patient."""

    run_id: str
    rounds: int
    steps: int
    noise_multiplier: float | None
    """Of the last charge."""
    epsilon: float | None
    """None where the run claims no privacy."""
    claims_privacy: bool
    evaluations: int
    """Releases of counts about validation patients."""
    site_epsilon: float | None
    """As the limit counts it with composition `site`: of a patient who trained, or validated, in all of the
    run, also where its cohorts differ; None as above."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What everything has cost the worst patient of the site."""

    epsilon: float
    """Over all private training, whatever the run or the server."""
    delta: float
    patients: int
    """Distinct units in the ledger; private."""
    not_private_patients: int
    """Units that also took part in training without a privacy claim; private."""
    runs: tuple[RunSpent, ...]
    site_epsilon: float
    """What every charge together would have cost a patient who was in all of them: at least `epsilon`.

    With composition `site` this is what a new run has behind it. It may be above the limit: within one run
    nobody both trains and validates, so the limit counts the two apart.
    """
    limit_epsilon: float
    """The same with training and validation of the last run apart: what the limit has counted so far."""

    @property
    def private(self) -> bool:
        """Whether epsilon describes all training: False once anybody was trained on without privacy."""
        return self.not_private_patients == 0

    def in_words(self) -> str:
        """One or two sentences for people."""
        words = (
            f"The worst-off patient has spent epsilon {self.epsilon:.4g} at delta {self.delta:.3g} "
            f"over {len(self.runs)} run(s)."
        )
        if self.site_epsilon > self.epsilon:
            words += (
                f" Composed over the whole site, as if every patient had been in every run, training and "
                f"validation alike, it is epsilon {self.site_epsilon:.4g}: with policy.composition = "
                f'"site" noise and refusals of a new run go by that. No patient has spent it.'
            )
        if self.private:
            return words
        return (
            f"{words} {self.not_private_patients} patient(s) also took part in training that claims no "
            "privacy: for them nothing is guaranteed, and this epsilon counts private training only."
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something `ledger verify` does not accept."""

    kind: str
    """chain, head, file, cohort, duplicate, seal, epsilon, cross-check or receipt."""
    message: str
    charge: int | None = None
    """Number of the charge concerned."""


def worst_histories(
    lines: Sequence[Line], cohorts: Mapping[str, frozenset[bytes]], members: frozenset[bytes] | None = None
) -> list[History]:
    """Distinct merged histories of `members` (None: everybody), without those that another one contains.

    A history contained in another (no more steps of any kind) cannot cost more. Nobody with a history: [()].
    What EVERYBODY was charged is part of every history, also of those to come. Set algebra over the distinct
    cohorts, so 100 charges on one cohort cost as much as one.
    """
    by_cohort: dict[str, list[PrivacyEvent]] = {}
    for digest, event in lines:
        by_cohort.setdefault(digest, []).append(event)
    everybodys = merge(by_cohort.pop(EVERYBODY, []))
    signatures: dict[bytes, int] = {}
    for index, digest in enumerate(by_cohort):
        held = cohorts[digest] if members is None else cohorts[digest] & members
        for unit in held:
            signatures[unit] = signatures.get(unit, 0) | (1 << index)
    costs = [merge(events) for events in by_cohort.values()]
    kinds = {_merged(costs, everybodys, signature) for signature in {0, *signatures.values()}}
    worst = [mine for mine in kinds if not any(mine != other and _contains(other, mine) for other in kinds)]
    return [_events(history) for history in sorted(worst)]


def composed(lines: Sequence[Line], composition: Composition) -> Sequence[Line]:
    """The lines as this rule counts them: `site` takes every patient to have been in every cohort."""
    return [(EVERYBODY, event) for _, event in lines] if composition == "site" else lines


def _merged(costs: list[Kinds], everybodys: Kinds, signature: int) -> Kinds:
    chosen = [everybodys, *(cost for index, cost in enumerate(costs) if signature >> index & 1)]
    return merge(event for cost in chosen for event in _events(cost))


def _contains(other: Kinds, mine: Kinds) -> bool:
    steps = {(q, sigma): count for q, sigma, count in other}
    return all(steps.get((q, sigma), 0) >= count for q, sigma, count in mine)


def _events(kinds: Kinds) -> History:
    return tuple(PrivacyEvent(sampling_rate=q, noise_multiplier=sigma, steps=n) for q, sigma, n in kinds)
