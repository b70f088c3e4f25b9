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
from common.config import FederationConfig
from common.errors import RefusalCode
from common.files import append_line
from common.messages import Envelope
from common.parameters import Parameters, parameters_sha256, template_of, to_record
from server.collection import Status
from server.evaluation_checks import CountedAnswer, judge_counts
from server.evaluation_result import COUNTED, EVALUATIONS, NOT_SENT, counted_hospitals, evaluations_in
from server.exchange import receive, send
from server.federation import Federation
from server.hospitals import Hospital
from server.receipts import keep_receipt_of, newest_receipt
from server.run_folder import RunFolder
from server.run_state import RunState
from server.update_checks import Outcome, Question, Rejection

log = logging.getLogger(__name__)


def checkpoint_rounds(config: FederationConfig) -> tuple[int, ...]:
    """Rounds before the last after which the model is scored, evenly spread.

    Example: 20 rounds and 3 checkpoints: after rounds 5, 10 and 15.
    """
    rounds, wanted = config.federation.rounds, config.evaluation.checkpoints
    spread = {rounds * number // (wanted + 1) for number in range(1, wanted + 1)}
    return tuple(sorted(spread - {0, rounds}))


def evaluate_checkpoint(federation: Federation, state: RunState) -> None:
    """Score the model after a round, where this round is one of `checkpoint_rounds`."""
    if state.round_number in checkpoint_rounds(federation.config):
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
    asked = _answers(federation, question, model, hospitals)
    if folder.stop_requested and any(one.outcome == Outcome.LATE for one in asked.values()):
        return  # asked again when the run goes on: hospitals send what they have sealed
    counts, variance = summed(one.answer for one in asked.values() if one.answer is not None)
    line = {
        "round": state.round_number,
        "attempt": federation.attempt,
        "final": final,
        "time": time.time(),
        "model_sha256": sha256,
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
    federation: Federation, question: Question, model: Parameters, hospitals: Sequence[Hospital]
) -> dict[str, _Asked]:
    """Send the model to `hospitals` and judge what comes within the deadline, at most the patience."""
    arrays, settings = to_record(model), federation.config.server
    timeout_s = min(settings.deadline_s, settings.patience_s)
    contents = {hospital.node_id: _request(federation, question, arrays, hospital) for hospital in hospitals}
    group = f"evaluation-{question.envelope.key.round_number}"
    sent = send(federation.grid, contents, message_type=messages.EVALUATE, group=group, ttl_s=timeout_s)
    asked = {hospital.name: _Asked(hospital=hospital) for hospital in hospitals}
    by_message = {sent[h.node_id].message_id: asked[h.name] for h in hospitals if h.node_id in sent}
    for hospital in hospitals:
        if hospital.node_id not in sent:
            asked[hospital.name].outcome, asked[hospital.name].code = Outcome.FAILED.value, NOT_SENT
    for reply in receive(
        federation.grid, by_message, timeout_s=timeout_s, stop=lambda: federation.folder.stop_requested
    ):
        one = by_message[reply.metadata.reply_to_message_id]
        keep_receipt_of(federation, reply, question, one.hospital)
        _take(one, reply, question)
    return asked


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
    judged = judge_counts(reply, question, asked.hospital)
    if isinstance(judged, Rejection):
        asked.outcome, asked.code = judged.outcome.value, judged.code
        # A hospital that lets no metrics out has decided so; everything else somebody should look at.
        level = logging.INFO if judged.code == RefusalCode.METRICS else logging.WARNING
        log.log(level, "%s gives no counts: %s (%s)", asked.hospital.name, asked.outcome, asked.code)
        return
    asked.outcome, asked.answer = COUNTED, judged


def _record(folder: RunFolder, line: Mapping[str, Any]) -> None:
    append_line(folder.path / EVALUATIONS, json.dumps(line, allow_nan=False), durable=True)


def _tell(line: Mapping[str, Any]) -> None:
    counted = counted_hospitals(line)
    words = f"validation after round {line['round']}: {len(counted)} of {len(line['hospitals'])} hospitals"
    log.info("%s", words if counted else f"{words}, no metrics")
