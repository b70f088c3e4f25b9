"""Recompute what the ledger says from the events alone, by two accountants.

A stored epsilon must bound what dp-accounting proves (recomputed from nothing) for the worst patient whom
the run had for the charge's purpose, over all that the patient went through in the run. It must not exceed
that by more than a coarser grid explains, or, where cohorts differ, what it would be had all patients of the
purpose been in all of it. The last one of each run and purpose is also held against Opacus' PRV and RDP.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from client.ledger.costs import members_of, site_histories
from client.ledger.records import Charge, Finding, History, worst_histories
from client.ledger.rows import counted_lines
from common.privacy.accountant import RUNNING_GRID, epsilon_prv, epsilon_rdp, recomputed_epsilon

_EXACT = 1e-6
_GRID_SHARE = 1e-2
_PRV_ERROR = 0.02
_PRV_CEILING = 50.0
"""Above it Opacus' PRV takes minutes and gigabytes; RDP alone is the cross-check."""


def content_findings(charges: Sequence[Charge], cohorts: Mapping[str, frozenset[bytes]]) -> list[Finding]:
    """What is wrong with the charges, apart from their hashes."""
    return [
        *_unknown_cohorts(charges, cohorts),
        *_repeated(charges),
        *(finding for run in _runs(charges) for finding in _wrong_costs(run, cohorts)),
    ]


def _runs(charges: Sequence[Charge]) -> list[list[Charge]]:
    runs: dict[str, list[Charge]] = {}
    for charge in charges:
        runs.setdefault(charge.key.run_id, []).append(charge)
    return list(runs.values())


def _unknown_cohorts(charges: Sequence[Charge], cohorts: Mapping[str, frozenset[bytes]]) -> Iterator[Finding]:
    for charge in charges:
        if charge.cohort_digest not in cohorts:
            yield Finding(kind="cohort", message="the charge's cohort is missing", charge=charge.number)


def _repeated(charges: Sequence[Charge]) -> Iterator[Finding]:
    keys = Counter((charge.key, charge.purpose) for charge in charges)
    rounds: dict[tuple[str, int, int, str], set[str]] = {}
    for charge in charges:
        place = (charge.key.run_id, charge.key.attempt, charge.key.round_number, charge.purpose)
        rounds.setdefault(place, set()).add(charge.key.model_hash)
    for (key, purpose), count in keys.items():
        if count > 1:
            yield Finding(kind="duplicate", message=f"{purpose} of round {key} was charged {count} times")
    for (run_id, attempt, number, purpose), models in rounds.items():
        if len(models) > 1:
            what = f"{purpose} of {run_id}/{attempt}/{number} was charged for {len(models)} models"
            yield Finding(kind="duplicate", message=what)


def _wrong_costs(run: Sequence[Charge], cohorts: Mapping[str, frozenset[bytes]]) -> Iterator[Finding]:
    claiming = [charge for charge in run if charge.claims_privacy and charge.cohort_digest in cohorts]
    for charge in run:
        if charge.claims_privacy != (charge.epsilon is not None):
            message = "a claim without epsilon, or an epsilon without claim"
            yield Finding(kind="epsilon", message=message, charge=charge.number)
    last = {charge.purpose: charge.number for charge in claiming}
    for index, charge in enumerate(claiming):
        if charge.epsilon is None:
            continue
        so_far, is_last = claiming[: index + 1], last[charge.purpose] == charge.number
        members = members_of(so_far, cohorts, charge.purpose)
        histories = worst_histories(counted_lines(so_far), cohorts, members)
        quick = max(recomputed_epsilon(h, delta=charge.delta, grid=RUNNING_GRID) for h in histories)
        if not is_last and abs(charge.epsilon - quick) <= _EXACT:
            continue
        proven = max(recomputed_epsilon(h, delta=charge.delta) for h in histories)
        if charge.epsilon < proven - _EXACT:
            message = f"stored epsilon {charge.epsilon:.6f} understates its events, which cost {proven:.6f}"
            yield Finding(kind="epsilon", message=message, charge=charge.number)
        elif charge.epsilon > _most(so_far, cohorts, proven) * (1 + _GRID_SHARE) + _EXACT:
            message = f"stored epsilon {charge.epsilon:.6f} does not belong to its events ({proven:.6f})"
            yield Finding(kind="epsilon", message=message, charge=charge.number)
        if is_last:
            yield from _cross_check(charge, proven, histories)


def _most(charges: Sequence[Charge], cohorts: Mapping[str, frozenset[bytes]], proven: float) -> float:
    """The largest cost that the last charge may state: as if all had been in all of its purpose (`site`)."""
    first = charges[0].cohort_digest
    if cohorts[first] and all(charge.cohort_digest == first for charge in charges):
        return proven  # an empty cohort is charged like any other
    histories = site_histories(charges, cohorts, charges[-1].purpose)
    return max(recomputed_epsilon(history, delta=charges[-1].delta) for history in histories)


def _cross_check(charge: Charge, proven: float, histories: Sequence[History]) -> Iterator[Finding]:
    rdp = max(epsilon_rdp(history, delta=charge.delta) for history in histories)
    if rdp < proven - _PRV_ERROR:
        message = f"Opacus RDP proves {rdp:.4f}, below dp-accounting's {proven:.4f}: one of them is wrong"
        yield Finding(kind="cross-check", message=message, charge=charge.number)
    if proven > _PRV_CEILING:
        return
    prv = max(epsilon_prv(history, delta=charge.delta) for history in histories)
    if abs(prv - proven) > _PRV_ERROR + _GRID_SHARE * proven:
        message = f"Opacus PRV says {prv:.4f}, dp-accounting {proven:.4f}"
        yield Finding(kind="cross-check", message=message, charge=charge.number)
