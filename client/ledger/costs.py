"""What charges cost: the limit before a charge, its run's cost after it, and everything so far."""

from collections.abc import Iterable, Mapping, Sequence

from client.budget_words import budget_error
from client.ledger.records import (
    EVALUATION,
    EVERYBODY,
    TRAINING,
    Charge,
    Cohort,
    Composition,
    History,
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
    cost is that of the run alone, to the worst of all patients whom it has had for `purpose`, with everything
    that they went through in it.
    """
    if event is None:
        return None
    new, known = (cohort.digest, event), {**cohorts, cohort.digest: cohort.hashes}
    if limit is not None:
        rehearsed = None if claims_privacy else run_id
        earlier = lines_behind(charges, composition, run_id=run_id, purpose=purpose, rehearsed_run=rehearsed)
        lines = [*earlier, *composed([new], composition)]
        _require_within(limit, lines, cohort, known, delta, composition)
    if not claims_privacy:
        return None
    mine = [charge for charge in charges if charge.key.run_id == run_id]
    own = lines_behind(mine, composition, run_id=run_id, purpose=purpose)
    histories = worst_histories([*own, *composed([new], composition)], known, cohort.hashes)
    # Who has left since counts with what really was: that was within the limit when it was charged.
    histories += worst_histories([*counted_lines(mine), new], known, members_of(mine, known, purpose))
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


def members_of(charges: Iterable[Charge], cohorts: Cohorts, purpose: str) -> frozenset[bytes]:
    """All patients of the cohorts that these charges had for this purpose and claim privacy for."""
    mine = {c.cohort_digest for c in charges if c.purpose == purpose and c.claims_privacy}
    return frozenset[bytes]().union(*(cohorts[digest] for digest in mine))


def _require_within(
    limit: float,
    lines: Sequence[Line],
    cohort: Cohort,
    cohorts: Cohorts,
    delta: float,
    composition: Composition,
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
                composition=composition,
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
        limit_epsilon=_limit_cost(charges, cohorts, delta),
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
        site_epsilon=_site_cost(charges, cohorts, delta) if claims else None,
        claims_privacy=claims,
        evaluations=sum(charge.purpose == EVALUATION for charge in charges),
    )


def _limit_cost(charges: Sequence[Charge], cohorts: Cohorts, delta: float) -> float:
    """What the limit has counted under `site` by the last charge, for both purposes of its run."""
    mine = [charge for charge in charges if charge.key.run_id == charges[-1].key.run_id]
    costs = [0.0]
    for purpose in {charge.purpose for charge in mine}:
        lines = lines_behind(charges, "site", run_id=mine[0].key.run_id, purpose=purpose)
        members = members_of(mine, cohorts, purpose)
        costs += [epsilon(history, delta=delta) for history in worst_histories(lines, cohorts, members)]
    return max(costs)


def _site_cost(charges: Sequence[Charge], cohorts: Cohorts, delta: float) -> float:
    """As the limit counts one run under `site`: each purpose as if all its patients had been in all of it."""
    return max(
        epsilon(history, delta=delta)
        for purpose in {charge.purpose for charge in charges}
        for history in site_histories(charges, cohorts, purpose)
    )


def site_histories(charges: Sequence[Charge], cohorts: Cohorts, purpose: str) -> list[History]:
    """What `site` takes the patients of this purpose to have gone through in the run of these charges."""
    lines = lines_behind(charges, "site", run_id=charges[0].key.run_id, purpose=purpose)
    return worst_histories(lines, cohorts, members_of(charges, cohorts, purpose))


def _worst(lines: Sequence[Line], cohorts: Cohorts, delta: float) -> float:
    return max(epsilon(history, delta=delta) for history in worst_histories(lines, cohorts))
