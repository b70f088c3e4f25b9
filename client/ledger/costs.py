"""What charges cost: the limit before a charge, its run's cost after it, and everything so far."""

from collections.abc import Mapping, Sequence

from client.budget_words import budget_error
from client.ledger.records import (
    EVALUATION,
    EVERYBODY,
    TRAINING,
    Charge,
    Cohort,
    Composition,
    Line,
    RunSpent,
    Spent,
    composed,
    worst_histories,
)
from client.ledger.rows import counted_lines
from common.privacy.accountant import epsilon, fits, running_epsilon
from common.privacy.plan import PrivacyEvent

Cohorts = Mapping[str, frozenset[bytes]]


def cost_of_charge(
    charges: Sequence[Charge],
    cohorts: Cohorts,
    *,
    run_id: str,
    event: PrivacyEvent | None,
    cohort: Cohort,
    delta: float,
    limit: float | None = None,
    claims_privacy: bool = True,
    composition: Composition = "patient",
    purpose: str = TRAINING,
) -> float | None:
    """What the run will have cost once `event` is charged after `charges`; None where nothing is claimed.

    Raises BudgetError where the event takes a patient of `cohort` above `limit`, over everything charged. The
    cost is that of the run alone, over all cohorts it had, and is never said to be above the limit.
    """
    if event is None:
        return None
    new, known = (cohort.digest, event), {**cohorts, cohort.digest: cohort.hashes}
    if limit is not None:
        rehearsed = None if claims_privacy else run_id
        earlier = lines_behind(charges, composition, run_id=run_id, purpose=purpose, rehearsed_run=rehearsed)
        _require_within(limit, [*earlier, *composed([new], composition)], cohort, known, delta)
    if not claims_privacy:
        return None
    mine = [charge for charge in charges if charge.key.run_id == run_id]
    own = lines_behind(mine, composition, run_id=run_id, purpose=purpose)
    histories = worst_histories(
        [*own, *composed([new], composition)], known, cohort.hashes if composition == "site" else None
    )
    histories += worst_histories(counted_lines([c for c in mine if c.purpose != purpose]), known)
    bound = max(running_epsilon(history, delta=delta) for history in histories)
    if limit is None or bound <= limit:
        return bound
    return max(epsilon(history, delta=delta) for history in histories)


def lines_behind(
    charges: Sequence[Charge],
    composition: Composition,
    *,
    run_id: str,
    purpose: str = TRAINING,
    rehearsed_run: str | None = None,
) -> Sequence[Line]:
    """What counts against a charge of this run and purpose, as `composition` says.

    With `site` everybody is taken to have been in every charge, but for those of the same run with another
    purpose, which count for their own cohort: in one run nobody both trains and validates. That is so for any
    data, so it tells nothing; who does change sides in the midst of a run is charged for both.
    """
    if composition == "patient":
        return counted_lines(charges, rehearsed_run)
    apart = [c for c in charges if c.key.run_id == run_id and c.purpose != purpose]
    numbers = {charge.number for charge in apart}
    rest = [charge for charge in charges if charge.number not in numbers]
    return [
        *composed(counted_lines(rest, rehearsed_run), composition),
        *counted_lines(apart, rehearsed_run),
    ]


def _require_within(
    limit: float, lines: Sequence[Line], cohort: Cohort, cohorts: Cohorts, delta: float
) -> None:
    for history in worst_histories(lines, cohorts, cohort.hashes):
        if not fits(history, epsilon=limit, delta=delta):
            before = worst_histories(lines[:-1], cohorts, cohort.hashes)
            raise budget_error(
                f"this round would take a patient above epsilon {limit:g}",
                history=max(before, key=lambda events: running_epsilon(events, delta=delta)),
                event=lines[-1][1],
                limit=limit,
                delta=delta,
            )


def all_spent(charges: Sequence[Charge], cohorts: Cohorts, *, delta: float) -> Spent:
    """What everything has cost at `delta`: the worst patient, the site as a whole, each run on its own."""
    lines = counted_lines(charges)
    everyone = frozenset[bytes]().union(*cohorts.values())
    exposed = {charge.cohort_digest for charge in charges if not charge.claims_privacy}
    touched = frozenset[bytes]().union(*(cohorts[digest] for digest in exposed))
    runs = dict.fromkeys(charge.key.run_id for charge in charges)
    return Spent(
        epsilon=_worst(lines, cohorts, delta),
        site_epsilon=_worst(composed(lines, "site"), cohorts, delta),
        delta=delta,
        patients=len(everyone),
        not_private_patients=max(1, len(everyone)) if EVERYBODY in exposed else len(touched),
        runs=tuple(_run_spent([c for c in charges if c.key.run_id == run], cohorts, delta) for run in runs),
    )


def _run_spent(charges: Sequence[Charge], cohorts: Cohorts, delta: float) -> RunSpent:
    claims = all(charge.claims_privacy for charge in charges)
    lines = counted_lines(charges)
    trained = [charge for charge in charges if charge.purpose == TRAINING]
    events = [charge.event for charge in trained if charge.event is not None]
    return RunSpent(
        run_id=charges[0].key.run_id,
        rounds=len({charge.key.round_number for charge in trained}),
        steps=sum(event.steps for event in events),
        noise_multiplier=events[-1].noise_multiplier if events else None,
        epsilon=_worst(lines, cohorts, delta) if claims else None,
        site_epsilon=_worst(composed(lines, "site"), cohorts, delta) if claims else None,
        claims_privacy=claims,
        evaluations=sum(charge.purpose == EVALUATION for charge in charges),
    )


def _worst(lines: Sequence[Line], cohorts: Cohorts, delta: float) -> float:
    return max(epsilon(history, delta=delta) for history in worst_histories(lines, cohorts))
