"""Scoring a model on the hospitals' validation patients: ask each hospital once, keep the sum of the counts.

Only noised counts arrive, and each evaluation costs the validation patients privacy: it is done as often as
the configuration says, its sum is kept in `evaluations.jsonl`, and a resumed run does not ask again.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from common import messages
from common.errors import RefusalCode
from common.evaluation import checkpoint_rounds
from common.files import append_line
from common.messages import Envelope
from common.parameters import Parameters, into_record, parameters_sha256, template_of
from server.collection import Status, approval_pause
from server.evaluation_checks import CountedAnswer, judge_counts
from server.evaluation_result import COUNTED, EVALUATIONS, NOT_SENT, counted_hospitals, evaluations_in
from server.exchange import LONGEST_PAUSE_S, receive, send
from server.federation import Federation
from server.hospitals import Hospital
from server.receipts import keep_receipt_of, newest_receipt
from server.run_folder import RunFolder
from server.run_state import RunState
from server.update_checks import Outcome, Question, Rejection

log = logging.getLogger(__name__)


def evaluate_checkpoint(federation: Federation, state: RunState) -> None:
    """Score the model after a round, where this round is one of `checkpoint_rounds`."""
    config = federation.config
    if state.round_number in checkpoint_rounds(config.federation.rounds, config.evaluation.checkpoints):
        _evaluate(federation, state, federation.roster.present(), final=False)


def evaluate_final(federation: Federation, state: RunState, status: Status) -> None:
    """Score the model that the run hands out. Who has left training for its budget is asked, too."""
    is_over = status in (Status.COMPLETED, Status.BUDGET_EXHAUSTED)
    if is_over and state.round_number and federation.config.evaluation.at_end:
        federation.roster.greet(federation.envelope(state))
        _evaluate(federation, state, federation.roster.connected(), final=True)


@dataclass(kw_only=True)
class _Asked:
    """What became of one hospital in an evaluation; late until it has answered."""

    hospital: Hospital
    outcome: str = Outcome.LATE.value
    code: str | None = None
    answer: CountedAnswer | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a person there has still to approve."""
        return self.outcome == Outcome.REFUSED and self.code == RefusalCode.APPROVAL

    def to_dict(self) -> dict[str, Any]:
        """The hospital's part of the line; of its counts only the sum with the others' is kept."""
        line: dict[str, Any] = {"outcome": self.outcome, "code": self.code}
        if self.answer is None:
            return line
        line["kinds"] = list(self.answer.plan.kinds)
        names = (messages.NOISE_MULTIPLIER, messages.EPSILON, messages.DELTA)
        return line | {name.replace("-", "_"): self.answer.metrics.get(name) for name in names}


def _evaluate(federation: Federation, state: RunState, hospitals: Sequence[Hospital], *, final: bool) -> None:
    """Have the model of `state` scored and record the sum, unless that was done; silence is no failure."""
    config, folder = federation.config, federation.folder
    model = state.result(config)
    sha256 = parameters_sha256(model)
    done = [
        line
        for line in evaluations_in(folder.path)
        if line["round"] == state.round_number and line["model_sha256"] == sha256 and counted_hospitals(line)
    ]
    if done:
        if final and not any(line["final"] for line in done):
            _record(folder, {**done[-1], "final": True})  # scored as a checkpoint: it costs nothing again
        return
    question = _question(federation, federation.envelope(state, model_sha256=sha256), model)
    asked = _answers(federation, question, model, hospitals, final=final)
    unanswered = [one for one in asked.values() if one.outcome == Outcome.LATE or final and one.is_waiting]
    if folder.stop_requested and unanswered:
        return  # asked again when the run goes on: hospitals send what they have sealed
    counts, variance = summed(one.answer for one in asked.values() if one.answer is not None)
    line = {
        "round": state.round_number,
        "attempt": federation.attempt,
        "final": final,
        "time": time.time(),
        "model_sha256": sha256,
        "task": config.data.task,
        "classes": len(config.data.classes),
        "score_bins": config.evaluation.score_bins,
        "hospitals": {name: one.to_dict() for name, one in sorted(asked.items())},
        "counts": counts,
        "noise_variance": variance,
    }
    _record(folder, line)
    _tell(line)


def summed(answers: Iterable[CountedAnswer]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Sum of the counts by kind, and the variance of the noise on each of its cells."""
    counts: dict[str, list[float]] = {}
    variance: dict[str, float] = {}
    for answer in answers:
        for kind, values in answer.counts.items():
            before = counts.get(kind, [0.0] * len(values))
            counts[kind] = [a + b for a, b in zip(before, values, strict=True)]
            variance[kind] = variance.get(kind, 0.0) + answer.noise_variance
    return counts, variance


def _question(federation: Federation, envelope: Envelope, model: Parameters) -> Question:
    settings = federation.config.server
    return Question(
        envelope=envelope,
        plan=federation.config.public_plan,
        template=template_of(model),
        weights_norm=0.0,
        norm_factor=settings.update_norm_factor,
        maximum_noise_multiplier=settings.maximum_noise_multiplier,
    )


def _answers(
    federation: Federation,
    question: Question,
    model: Parameters,
    hospitals: Sequence[Hospital],
    *,
    final: bool,
) -> dict[str, _Asked]:
    """Send the model to `hospitals` and judge what comes within the deadline, at most the patience.

    After the `final` model nothing waits for the answers, so whoever waits for a person is asked again.
    """
    settings = federation.config.server
    patience_s = min(settings.deadline_s, settings.patience_s)
    pause_s = approval_pause(patience_s) if final else patience_s
    give_up_at = time.monotonic() + patience_s
    asked = {hospital.name: _Asked(hospital=hospital) for hospital in hospitals}
    arrays = into_record(model)
    pending = _send(federation, question, arrays, list(asked.values()), ttl_s=patience_s)
    while True:
        again_at = min(time.monotonic() + pause_s, give_up_at)
        _receive(federation, question, pending, until=again_at)
        waiting = [one for one in asked.values() if one.is_waiting] if final else []
        while waiting and time.monotonic() < again_at and not federation.folder.stop_requested:
            time.sleep(min(LONGEST_PAUSE_S, pause_s / 4))
        left_s = give_up_at - time.monotonic()
        if not (pending or waiting) or left_s <= 0 or federation.folder.stop_requested:
            return asked
        pending |= _send(federation, question, arrays, waiting, ttl_s=left_s)


def _send(
    federation: Federation, question: Question, arrays: ArrayRecord, due: Sequence[_Asked], *, ttl_s: float
) -> dict[str, _Asked]:
    """Ask those who are due; by message, who was asked."""
    contents = {one.hospital.node_id: _request(federation, question, arrays, one.hospital) for one in due}
    group = f"evaluation-{question.envelope.key.round_number}"
    sent = send(federation.grid, contents, message_type=messages.EVALUATE, group=group, ttl_s=ttl_s)
    for one in due:
        if one.hospital.node_id not in sent and not one.is_waiting:
            one.outcome, one.code = Outcome.FAILED.value, NOT_SENT
    return {sent[node].message_id: one for one in due if (node := one.hospital.node_id) in sent}


def _receive(federation: Federation, question: Question, pending: dict[str, _Asked], *, until: float) -> None:
    """Judge what comes; answered questions leave `pending`."""
    for reply in receive(
        federation.grid,
        list(pending),
        timeout_s=max(0.0, until - time.monotonic()),
        stop=lambda: federation.folder.stop_requested,
    ):
        one = pending.pop(reply.metadata.reply_to_message_id)
        keep_receipt_of(federation, reply, question, one.hospital)
        _take(one, reply, question)


def _request(
    federation: Federation, question: Question, arrays: ArrayRecord, hospital: Hospital
) -> RecordDict:
    return RecordDict(
        {
            messages.ENVELOPE: question.envelope.to_record(),
            messages.ARRAYS: arrays,
            messages.REQUEST: messages.plan_to_record(federation.config.public_plan),
            **messages.receipt_record(newest_receipt(federation, hospital.name)),
        }
    )


def _take(asked: _Asked, reply: Message, question: Question) -> None:
    judged, was_waiting = judge_counts(reply, question, asked.hospital), asked.is_waiting
    if isinstance(judged, Rejection):
        asked.outcome, asked.code = judged.outcome.value, judged.code
        if asked.is_waiting and was_waiting:
            return  # told before
        # A hospital that lets no metrics out has decided so; everything else somebody should look at.
        level = logging.INFO if judged.code == RefusalCode.METRICS else logging.WARNING
        log.log(level, "%s gives no counts: %s (%s)", asked.hospital.name, asked.outcome, asked.code)
        return
    asked.outcome, asked.code, asked.answer = COUNTED, None, judged


def _record(folder: RunFolder, line: Mapping[str, Any]) -> None:
    append_line(folder.path / EVALUATIONS, json.dumps(line, allow_nan=False), durable=True)


def _tell(line: Mapping[str, Any]) -> None:
    counted = counted_hospitals(line)
    words = f"validation after round {line['round']}: {len(counted)} of {len(line['hospitals'])} hospitals"
    log.info("%s", words if counted else f"{words}, no metrics")
