"""What the server believes of a reply: nothing, until every check here has passed.

A reply is either an `Update` to aggregate or a `Rejection`. Of a rejection only an enumerated code is kept;
no text that a hospital wrote goes into a log or a file.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from flwr.app import Message

from common import messages
from common.config import PublicPlan
from common.errors import WireError
from common.messages import Envelope
from common.parameters import Parameters, Template, from_record, l2_norm, num_parameters
from common.privacy.accountant import running_epsilon
from common.privacy.plan import PrivacyEvent
from common.quantisation import Grid, Levels, levels_from, levels_norm, rounding_norm
from server.hospitals import Hospital
from server.recount import LEAST_NOISE_ACCOUNTED

A = TypeVar("A")

log = logging.getLogger(__name__)

ABSOLUTE_NORM_LIMIT = 1e6
"""No honest update is larger; where the plan gives no bound this alone keeps sums finite."""
_ADAM_STEP = 7.3
_RMSPROP_STEP = 10.0
_LEAST_SHARE_OF_COST = 0.99
"""Accountants of honest hospitals differ by less."""
_UPDATE_RECORDS = {messages.ENVELOPE, messages.ARRAYS, messages.METRICS}


class Outcome(StrEnum):
    """What became of one hospital in one round."""

    AGGREGATED = "aggregated"
    REFUSED = "refused"
    INVALID = "invalid"
    LATE = "late"
    FAILED = "failed"


class Defect(StrEnum):
    """Why a reply is invalid."""

    SENDER = "sender"
    RECORDS = "records"
    ENVELOPE = "envelope"
    ROUND_KEY = "round-key"
    ARRAYS = "arrays"
    METRICS = "metrics"
    NUM_EXAMPLES = "num-examples"
    STEPS = "steps"
    NOISE = "noise-multiplier"
    NORM = "update-norm"
    COUNTS = "counts"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What was asked of a hospital, and so what its reply must look like."""

    envelope: Envelope
    plan: PublicPlan
    template: Template
    weights_norm: float
    """Norm of the global weights that were sent."""
    norm_factor: float
    """Tolerance on the plan's bound of an update's norm."""
    maximum_noise_multiplier: float
    """A larger one is not believed: it would widen the bound at will."""
    grid: Grid | None = None
    """The announced grid; None where an update travels as float32."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """A reply that may be aggregated."""

    delta: Parameters | Levels
    """As it arrived: float32, or whole numbers in which the hospital's weight is applied already."""
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A reply that is not aggregated, and the enumerated reason."""

    outcome: Outcome
    code: str


class InvalidUpdateError(WireError):
    """A reply fails a check; carries the defect only."""

    def __init__(self, defect: Defect) -> None:
        super().__init__(f"the reply is invalid: {defect.value}")
        self.defect = defect


def judge_reply(reply: Message, question: Question, hospital: Hospital) -> Update | Rejection:
    """Check everything about a reply of `hospital`. Never raises: one bad reply must not end a run."""
    return judged(reply, question, hospital, _checked_update)


def judged(
    reply: Message,
    question: Question,
    hospital: Hospital,
    check: Callable[[Message, Question, Hospital], A],
) -> A | Rejection:
    """What `check` makes of the reply, if it is this hospital's answer to this question; never raises."""
    if reply.has_error():
        return Rejection(outcome=Outcome.FAILED, code=f"flower-{int(reply.error.code)}")
    try:
        check_sender_and_key(reply, question, hospital)
        if (refusal := messages.refusal_code(reply.content)) is not None:
            return Rejection(outcome=Outcome.REFUSED, code=refusal.value)
        return check(reply, question, hospital)
    except InvalidUpdateError as error:
        return Rejection(outcome=Outcome.INVALID, code=error.defect.value)
    except Exception as error:  # whatever a stranger's content breaks is its own defect
        log.warning("a reply could not be read (%s)", type(error).__name__)
        return Rejection(outcome=Outcome.INVALID, code=Defect.UNREADABLE.value)


def update_norm_bound(
    plan: PublicPlan,
    *,
    num_parameters: int,
    enrolled: int,
    noise_multiplier: float | None,
    weights_norm: float = 0.0,
) -> float | None:
    """Bound on the l2 norm of an honest update, from public numbers; None when the plan implies none.

    Private SGD. A step's gradient is (sum of clipped gradients + noise) / (q n), n enrolled. The sum is at
    most B C with B = q n + 8 sqrt(q n) + 16, which a Poisson sample of n exceeds with probability < 1e-12
    (Bernstein); the noise N(0, (sigma C)^2 I_d) is at most sigma C (sqrt(d) + 8) with the same confidence
    (Gaussian concentration). With momentum m the gradient of step s is used in all later steps, so T steps
    weigh sum_t (1 - m^t) / (1 - m), t = 1..T (T without momentum); decay adds lr * decay * |w| per step.

    Adam. |m_hat / sqrt(v_hat)| is at most 7.3 per coordinate for beta = (0.9, 0.999) whatever the gradients
    are (Cauchy-Schwarz on the two moving averages), so a step is at most 7.3 lr sqrt(d). RMSprop with its
    decay 0.99 keeps v >= 0.01 g^2, so |g / sqrt(v)| is at most 10. DP-AdamBC divides by the root of
    max(v_hat - Phi, floor), Phi = (sigma C / (q n))^2, which is at least v_hat floor / (Phi + floor): at most
    7.3 sqrt(1 + Phi / floor) per coordinate.

    SGD without privacy does not clip, and a reproducible run does not say its noise: there is no bound.
    Example: q n = 100, C = 1, sigma = 1, d = 10,000, lr = 0.5, one step: 0.5 * (196 + 108) / 100 = 1.52.
    """
    training, privacy = plan.training, plan.privacy
    steps, momentum, dimension = privacy.local_steps, training.momentum, math.sqrt(num_parameters)
    pull = training.weight_decay * weights_norm
    if training.optimizer == "adam":
        return training.learning_rate * steps * (_ADAM_STEP * dimension + pull)
    if training.optimizer == "rmsprop":
        return training.learning_rate * steps * (_RMSPROP_STEP * dimension + pull)
    if training.optimizer == "adam-bc":
        if noise_multiplier is None:
            return None
        noise = noise_multiplier * privacy.l2_clip_norm / (privacy.sampling_rate * enrolled)
        largest = _ADAM_STEP * math.sqrt(1 + noise**2 / training.adam_bc_floor)
        return training.learning_rate * steps * (largest * dimension + pull)
    if plan.federation.private and noise_multiplier is not None:
        expected_batch = privacy.sampling_rate * enrolled
        largest_batch = expected_batch + 8 * math.sqrt(expected_batch) + 16
        gradient = (
            privacy.l2_clip_norm * (largest_batch + noise_multiplier * (dimension + 8)) / expected_batch
        )
        weight = (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
        return training.learning_rate * weight * (gradient + pull)
    return None


def check_sender_and_key(reply: Message, question: Question, hospital: Hospital) -> None:
    """Check that a reply is this hospital's to this question. Raises InvalidUpdateError, WireError."""
    if reply.metadata.src_node_id != hospital.node_id:
        raise InvalidUpdateError(Defect.SENDER)
    try:
        envelope = Envelope.from_record(reply.content)
    except WireError:
        raise InvalidUpdateError(Defect.ENVELOPE) from None
    if envelope.key != question.envelope.key:
        raise InvalidUpdateError(Defect.ROUND_KEY)
    if envelope != question.envelope:
        raise InvalidUpdateError(Defect.ENVELOPE)


def _checked_update(reply: Message, question: Question, hospital: Hospital) -> Update:
    if set(reply.content) - {messages.LEDGER_RECEIPT} != _UPDATE_RECORDS:
        raise InvalidUpdateError(Defect.RECORDS)
    try:
        metrics = messages.metrics_of(reply.content)
    except WireError:
        raise InvalidUpdateError(Defect.METRICS) from None
    if metrics.get(messages.NUM_EXAMPLES) != hospital.stated_patients:
        raise InvalidUpdateError(Defect.NUM_EXAMPLES)
    check_cost(metrics, question)
    try:
        delta, norm = _update_and_norm(reply, question, hospital)
    except WireError:
        raise InvalidUpdateError(Defect.ARRAYS) from None
    if not norm <= _norm_limit(metrics, question, hospital):
        raise InvalidUpdateError(Defect.NORM)
    return Update(delta=delta, metrics=metrics)


def _update_and_norm(
    reply: Message, question: Question, hospital: Hospital
) -> tuple[Parameters | Levels, float]:
    arrays, template, grid = messages.arrays_of(reply.content), question.template, question.grid
    if grid is None:
        delta = from_record(arrays, template)
        return delta, l2_norm(delta)
    weight = hospital.enrolled_patients
    levels = levels_from(arrays, template, grid=grid, weight=weight)
    return levels, levels_norm(levels, template, grid=grid, weight=weight)


def check_cost(metrics: dict[str, float], question: Question) -> None:
    """Check what a reply states of steps, noise and cost against the plan. Raises InvalidUpdateError.

    The epsilon of a run is at least that of this one round, which follows from public numbers.
    """
    plan = question.plan
    steps = metrics.get(messages.STEPS, 0.0)
    if steps != int(steps) or not 0 <= steps <= plan.privacy.local_steps:
        raise InvalidUpdateError(Defect.STEPS)
    epsilon, delta = metrics.get(messages.EPSILON, 0.0), metrics.get(messages.DELTA, 0.0)
    if epsilon < 0 or not 0 <= delta < 1:
        raise InvalidUpdateError(Defect.METRICS)
    if not plan.claims_privacy:  # then hospitals do not say their noise: it protects nobody
        return
    noise_multiplier = metrics.get(messages.NOISE_MULTIPLIER, 0.0)
    least, most = plan.privacy.minimum_noise_multiplier, question.maximum_noise_multiplier
    if noise_multiplier <= 0 or not least <= noise_multiplier <= most:
        raise InvalidUpdateError(Defect.NOISE)
    if delta == 0 or not {messages.STEPS, messages.EPSILON} <= metrics.keys():
        raise InvalidUpdateError(Defect.METRICS)
    event = PrivacyEvent(
        sampling_rate=plan.privacy.sampling_rate,
        noise_multiplier=max(noise_multiplier, LEAST_NOISE_ACCOUNTED),
        steps=int(steps),
    )
    if epsilon < _LEAST_SHARE_OF_COST * running_epsilon([event], delta=delta):
        raise InvalidUpdateError(Defect.METRICS)


def _norm_limit(metrics: dict[str, float], question: Question, hospital: Hospital) -> float:
    bound = update_norm_bound(
        question.plan,
        num_parameters=num_parameters(question.template),
        enrolled=hospital.stated_patients,
        noise_multiplier=metrics.get(messages.NOISE_MULTIPLIER),
        weights_norm=question.weights_norm,
    )
    if bound is None:
        return ABSOLUTE_NORM_LIMIT
    limit = bound * question.norm_factor
    if question.grid is not None:
        weight = hospital.enrolled_patients
        limit += rounding_norm(question.template, grid=question.grid, weight=weight)
    return min(ABSOLUTE_NORM_LIMIT, limit)
