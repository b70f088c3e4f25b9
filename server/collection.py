"""Asking the hospitals of a round and keeping what they answer until the quorum is there."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from flwr.app import ArrayRecord, Message, RecordDict

from common import messages
from common.errors import RefusalCode
from common.messages import Envelope, content_bytes
from common.parameters import into_record, l2_norm, record_bytes, template_of
from server.exchange import Sent, receive, send
from server.exposure import Unheard, believable_cost, still_due, totals_with
from server.federation import Federation
from server.hospitals import Hospital
from server.receipts import keep_receipt_of, newest_receipt
from server.run_state import RunState
from server.spent import write_spent
from server.spool import Spool
from server.totals import HospitalTotals, OpenQuestion, short_key
from server.update_checks import Outcome, Question, Rejection, judge_reply
from server.update_grid import grid_of

_LONGEST_RETRY_PAUSE_S = 5.0
LONGEST_APPROVAL_PAUSE_S = 60.0
"""A person types no faster; each question brings the whole model, and a line in the hospital's audit."""

log = logging.getLogger(__name__)


class Status(StrEnum):
    """How a run, or a session of it, ends."""

    COMPLETED = "completed"
    STOPPED = "stopped"
    QUORUM_LOST = "quorum-lost"
    BUDGET_EXHAUSTED = "budget-exhausted"
    FAILED = "failed"


@dataclass(kw_only=True)
class Participation:
    """How one hospital takes part in the open round; late until it has answered."""

    hospital: Hospital
    sent: float
    """Unix seconds, as all times here."""
    outcome: Outcome = Outcome.LATE
    code: str | None = None
    received: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Scalars of an aggregated update."""
    epsilon: float | None = None
    """As stated believably, also by an update that is not aggregated."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """The answers of one round; valid updates are in the spool."""

    participations: dict[str, Participation]
    spool: Spool
    first_sent: float
    totals: dict[str, HospitalTotals]
    """Of every hospital of the run, with all that this round has brought so far."""
    told: set[tuple[str, str]] = field(default_factory=set)
    """Hospital and code of what the person has been told; repeated questions would repeat it."""

    @property
    def accepted(self) -> list[str]:
        """Hospitals whose update counts, in roster order."""
        return sorted(name for name, p in self.participations.items() if p.outcome is Outcome.AGGREGATED)


def collect_updates(federation: Federation, state: RunState) -> tuple[Collection, Status | None]:
    """Ask every hospital that is here, again within the patience while the quorum is missing.

    The status says why the round cannot close; None when it can. Repeating a question costs no privacy:
    a hospital answers the same round key with the bytes it has sealed.
    """
    settings, folder = federation.config.server, federation.folder
    collection = Collection(
        participations={},
        spool=Spool(folder.spool, template_of(state.weights)),
        first_sent=time.time(),
        totals=dict(state.hospitals),
    )
    greeting = federation.envelope(state, round_number=state.round_number + 1)
    grid = grid_of(federation.config.public_plan, state.grid)
    envelope = replace(greeting, encoding=messages.ENCODINGS[grid.bits if grid else 32])
    give_up_at: float | None = None
    while True:
        federation.roster.greet(greeting)
        asked = [h for h in federation.roster.present() if _is_due(h, collection, settings.patience_s)]
        _ask(federation, state, envelope, asked, collection)
        unanswered = [p for p in collection.participations.values() if p.received is None]
        if folder.stop_requested and unanswered:
            return collection, Status.STOPPED
        if len(collection.accepted) >= settings.quorum:
            return collection, None
        if folder.stop_requested:
            return collection, Status.STOPPED
        if federation.roster.all_have_left:
            spent = federation.roster.budget_is_spent
            return collection, Status.BUDGET_EXHAUSTED if spent else Status.QUORUM_LOST
        give_up_at = give_up_at or time.monotonic() + settings.patience_s
        if time.monotonic() >= give_up_at:
            _explain_lost_quorum(collection, settings.quorum)
            return collection, Status.QUORUM_LOST
        time.sleep(min(_LONGEST_RETRY_PAUSE_S, settings.patience_s / 10))


def approval_pause(patience_s: float) -> float:
    """Seconds until a hospital that waits for a person is asked again, within any patience once at least."""
    return min(LONGEST_APPROVAL_PAUSE_S, patience_s / 2)


def _is_due(hospital: Hospital, collection: Collection, patience_s: float) -> bool:
    """Whether to ask this hospital now: it has given no update, and no person there needs time to decide."""
    known = collection.participations.get(hospital.name)
    if known is None or known.outcome is Outcome.AGGREGATED:
        return known is None
    is_waiting = known.outcome is Outcome.REFUSED and known.code == RefusalCode.APPROVAL
    # A clock that was put back must not hold the question back.
    return not is_waiting or not 0 <= time.time() - known.sent < approval_pause(patience_s)


def _ask(
    federation: Federation,
    state: RunState,
    envelope: Envelope,
    hospitals: Sequence[Hospital],
    collection: Collection,
) -> None:
    """Send the round to `hospitals`; take and check replies until all came or the deadline passed."""
    if not hospitals:
        return
    deadline_s = federation.config.server.deadline_s
    arrays = into_record(state.weights)
    group = str(envelope.key.round_number)
    question = Question(
        envelope=envelope,
        plan=federation.config.public_plan,
        template=template_of(state.weights),
        weights_norm=l2_norm(state.weights),
        norm_factor=federation.config.server.update_norm_factor,
        maximum_noise_multiplier=federation.config.server.maximum_noise_multiplier,
        grid=grid_of(federation.config.public_plan, state.grid),
    )
    contents = {h.node_id: _request(federation, question, arrays, h) for h in hospitals}
    unheard = _open_questions(federation, collection, question, hospitals)
    sent = send(federation.grid, contents, message_type=messages.TRAIN, group=group, ttl_s=deadline_s)
    for hospital in hospitals:
        _note_sent(federation, collection, unheard[hospital.name], sent.get(hospital.node_id))
    by_message = {sent[h.node_id].message_id: h for h in hospitals if h.node_id in sent}
    reply_bytes = record_bytes(arrays)
    del arrays, contents
    for reply in receive(
        federation.grid,
        by_message,
        timeout_s=deadline_s,
        reply_bytes=reply_bytes,
        stop=lambda: federation.folder.stop_requested,
    ):
        hospital = by_message[reply.metadata.reply_to_message_id]
        _take(federation, reply, unheard[hospital.name], collection)
        del reply  # before the next one is fetched
    take_late_replies(federation, collection.totals, reply_bytes=reply_bytes)
    write_spent(federation.folder.spent, run_id=state.run_id, hospitals=collection.totals)


def take_late_replies(
    federation: Federation, totals: dict[str, HospitalTotals], *, reply_bytes: int = 0
) -> None:
    """Count what came after its round had closed, as far as it is there now; it is never aggregated."""
    unheard = federation.unheard
    for reply in receive(federation.grid, list(unheard), timeout_s=0.0, reply_bytes=reply_bytes):
        asked = unheard.pop(reply.metadata.reply_to_message_id)
        keep_receipt_of(federation, reply, asked.question, asked.hospital)
        totals[asked.hospital.name] = totals_with(totals[asked.hospital.name], reply, asked)
        del reply
    due = still_due(unheard.items(), grace_s=federation.config.server.deadline_s)
    unheard.clear()
    unheard.update(due)


def _open_questions(
    federation: Federation, collection: Collection, question: Question, hospitals: Sequence[Hospital]
) -> dict[str, Unheard]:
    """Write down, before anything is sent, that these hospitals may be about to charge their ledgers."""
    now, key = time.time(), question.envelope.key
    until = now + federation.config.server.deadline_s
    entry = OpenQuestion(key=short_key(key), asked=now, until=until)
    for hospital in hospitals:
        new = HospitalTotals(enrolled_patients=hospital.enrolled_patients)
        collection.totals[hospital.name] = collection.totals.get(hospital.name, new).asked(entry)
    write_spent(federation.folder.spent, run_id=key.run_id, hospitals=collection.totals)
    return {h.name: Unheard(hospital=h, question=question, entry=entry) for h in hospitals}


def _request(
    federation: Federation, question: Question, arrays: ArrayRecord, hospital: Hospital
) -> RecordDict:
    """The round, and back to each hospital the receipt of its ledger that it sent last."""
    content: dict[str, messages.Record] = {
        messages.ENVELOPE: question.envelope.to_record(),
        messages.ARRAYS: arrays,
        messages.REQUEST: messages.plan_to_record(question.plan),
        **messages.receipt_record(newest_receipt(federation, hospital.name)),
    }
    if question.grid is not None:
        content[messages.GRID] = messages.grid_to_record(question.grid, weight=hospital.enrolled_patients)
    return RecordDict(content)


def _note_sent(federation: Federation, collection: Collection, asked: Unheard, sent: Sent | None) -> None:
    hospital = asked.hospital
    before = collection.participations.get(hospital.name)
    now = Participation(hospital=hospital, sent=sent.sent if sent else time.time())
    if before is not None:
        now.bytes_down, now.bytes_up = before.bytes_down, before.bytes_up
    if sent is None:
        now.outcome, now.code, now.received = Outcome.FAILED, "not-sent", now.sent
        collection.totals[hospital.name] = collection.totals[hospital.name].withdrawn(asked.entry)
    else:
        now.bytes_down += sent.num_bytes
        federation.unheard[sent.message_id] = asked
    collection.participations[hospital.name] = now


def _take(federation: Federation, reply: Message, asked: Unheard, collection: Collection) -> None:
    """Judge one reply; spool its update or keep the code of what is wrong. Its cost counts either way."""
    name = asked.hospital.name
    participation = collection.participations[name]
    federation.unheard.pop(reply.metadata.reply_to_message_id, None)
    collection.totals[name] = totals_with(collection.totals[name], reply, asked)
    participation.received = time.time()
    participation.bytes_up += content_bytes(reply.content) if reply.has_content() else 0
    keep_receipt_of(federation, reply, asked.question, asked.hospital)
    judged = judge_reply(reply, asked.question, asked.hospital)
    if isinstance(judged, Rejection):
        participation.epsilon = (believable_cost(reply, asked) or {}).get(messages.EPSILON)
        participation.outcome, participation.code = judged.outcome, judged.code
        if (known := (participation.hospital.name, judged.code)) not in collection.told:
            collection.told.add(known)
            if judged.code == RefusalCode.APPROVAL:
                log.warning(
                    "%s waits for its own approval: a person there types flower-client approve", known[0]
                )
            else:
                log.warning("%s is left out: %s (%s)", known[0], judged.outcome, judged.code)
        if judged.outcome is Outcome.REFUSED and judged.code in (RefusalCode.BUDGET, RefusalCode.LEFT):
            federation.roster.leave(participation.hospital.name, RefusalCode(judged.code))
        return
    collection.spool.add(participation.hospital.name, judged.delta)
    participation.outcome, participation.code = Outcome.AGGREGATED, None
    participation.metrics = judged.metrics
    participation.epsilon = judged.metrics.get(messages.EPSILON)


def _explain_lost_quorum(collection: Collection, quorum: int) -> None:
    log.error("the quorum is lost: %d valid updates, %d are needed", len(collection.accepted), quorum)
    codes = {participation.code for participation in collection.participations.values()}
    if RefusalCode.CONFLICT.value in codes:
        log.error(
            "hospitals have answered this round for other weights (a checkpoint was lost); to have it "
            "trained anew, and charged again, write a higher number into `attempt` in the run folder"
        )
