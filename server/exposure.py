"""What a reply says of its hospital's cost, whether or not its update may be aggregated."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import Message

from common import messages
from common.errors import RefusalCode
from server.hospitals import Hospital
from server.totals import HospitalTotals, OpenQuestion
from server.update_checks import Question, check_cost, check_sender_and_key

PERHAPS_CHARGED = {
    RefusalCode.CONFLICT,
    RefusalCode.LEDGER,
    RefusalCode.LATE,
    RefusalCode.INTERNAL,
    RefusalCode.APPROVAL,
}
"""Refusals that can follow a charge; with any other the ledger was not touched for this question.

An approval may be missing for the plan, before the charge, or for the sealed update, after it: the code does
not say which."""


@dataclass(frozen=True, kw_only=True)
class Unheard:
    """A question that is out: to whom, what a reply must look like, and its entry in the totals."""

    hospital: Hospital
    question: Question
    entry: OpenQuestion

    @property
    def planned_steps(self) -> int:
        """Steps of one round."""
        return self.question.plan.privacy.local_steps


def totals_with(totals: HospitalTotals, reply: Message, unheard: Unheard) -> HospitalTotals:
    """The hospital's totals after `reply`. Never raises, whatever the reply holds."""
    entry, received = unheard.entry, time.time()
    if reply.has_error():
        return totals.answered_without_cost(entry, received=received)
    try:
        check_sender_and_key(reply, unheard.question, unheard.hospital)
        refused = messages.refusal_code(reply.content)
    except Exception:  # a stranger's content: nothing in it is believed
        return totals.answered_without_cost(entry, received=received)
    if refused is not None:
        if refused in PERHAPS_CHARGED:
            return totals.answered_without_cost(entry, received=received)
        return totals.withdrawn(entry)
    cost = believable_cost(reply, unheard)
    if cost is None:
        totals = totals.answered_without_cost(entry, received=received)
    return totals.released(entry, cost, planned_steps=unheard.planned_steps)


def believable_cost(reply: Message, unheard: Unheard) -> dict[str, float] | None:
    """The scalars of an update for this question, None unless sender, round key and cost are in order."""
    if reply.has_error():
        return None
    try:
        check_sender_and_key(reply, unheard.question, unheard.hospital)
        metrics = messages.metrics_of(reply.content)
        check_cost(metrics, unheard.question)
    except Exception:  # as above
        return None
    return metrics


def still_due(unheard: Iterable[tuple[str, Unheard]], *, grace_s: float) -> dict[str, Unheard]:
    """Those whose reply may still come: at most `grace_s` after the hospital had to be done."""
    now = time.time()
    return {message_id: one for message_id, one in unheard if one.entry.until + grace_s > now}
