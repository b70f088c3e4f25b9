"""What the server believes of an answer with counts: nothing, until every check here has passed."""

import math
from dataclasses import dataclass

from flwr.app import Message, MetricRecord

from common import messages
from common.errors import WireError
from common.evaluation import KINDS, ROUNDING_VARIANCE, CountPlan
from common.privacy.accountant import running_epsilon
from common.privacy.plan import PrivacyEvent
from server.hospitals import Hospital
from server.update_checks import Defect, InvalidUpdateError, Question, Rejection, judged

_RECORDS = {messages.ENVELOPE, messages.COUNTS, messages.METRICS}
_SCALARS = {messages.NUM_EXAMPLES, messages.NOISE_MULTIPLIER, messages.EPSILON, messages.DELTA}
_LEAST_SHARE_OF_COST = 0.99
_LEAST_NOISE_ACCOUNTED = 0.1
_MOST_DEVIATIONS = 20.0
"""No honest noise is larger (a normal number exceeds it with probability 1e-88)."""
_MOST_PER_ENROLLED = 10
"""A hospital may validate on more patients than it has enrolled, but not on this many times as many."""


@dataclass(frozen=True, kw_only=True)
class CountedAnswer:
    """An answer whose counts are added to the others'."""

    plan: CountPlan
    """What the hospital has released together."""
    counts: dict[str, list[float]]
    metrics: dict[str, float]

    @property
    def noise_variance(self) -> float:
        """Variance of the noise on every cell; 0 for exact counts."""
        stddev = self.plan.noise_stddev(self.metrics.get(messages.NOISE_MULTIPLIER, 0.0))
        return stddev**2 + ROUNDING_VARIANCE if stddev else 0.0


def judge_counts(reply: Message, question: Question, hospital: Hospital) -> CountedAnswer | Rejection:
    """Check everything about an answer of `hospital`. Never raises: one bad answer must not end a run."""
    return judged(reply, question, hospital, _checked)


def _checked(reply: Message, question: Question, hospital: Hospital) -> CountedAnswer:
    if set(reply.content) - {messages.LEDGER_RECEIPT} != _RECORDS:
        raise InvalidUpdateError(Defect.RECORDS)
    try:
        metrics = messages.metrics_of(reply.content)
    except WireError:
        raise InvalidUpdateError(Defect.METRICS) from None
    if set(metrics) - _SCALARS:
        raise InvalidUpdateError(Defect.METRICS)
    if metrics.get(messages.NUM_EXAMPLES) != hospital.stated_patients:
        raise InvalidUpdateError(Defect.NUM_EXAMPLES)
    _check_cost(metrics, question)
    record = reply.content[messages.COUNTS]
    if not isinstance(record, MetricRecord) or not record or set(record) - set(KINDS):
        raise InvalidUpdateError(Defect.COUNTS)
    asked = question.plan
    plan = CountPlan.of(
        record,
        classes=len(asked.data.classes),
        score_bins=asked.evaluation.score_bins,
        task=asked.data.task,
    )
    answer = CountedAnswer(
        plan=plan,
        counts={kind: _cells(record[kind], plan.length(kind)) for kind in plan.kinds},
        metrics=metrics,
    )
    _check_size(answer, hospital)
    return answer


def _cells(values: object, length: int) -> list[float]:
    """A list of so many whole numbers."""
    if not isinstance(values, list) or len(values) != length:
        raise InvalidUpdateError(Defect.COUNTS)
    cells = [float(value) for value in values]
    if not all(math.isfinite(cell) and cell == round(cell) for cell in cells):
        raise InvalidUpdateError(Defect.COUNTS)
    return cells


def _check_size(answer: CountedAnswer, hospital: Hospital) -> None:
    """Each count lies between no patient and far more than are enrolled, give or take its noise."""
    noise = _MOST_DEVIATIONS * math.sqrt(answer.noise_variance)
    most = _MOST_PER_ENROLLED * hospital.stated_patients + noise
    if not all(-noise <= cell <= most for cells in answer.counts.values() for cell in cells):
        raise InvalidUpdateError(Defect.COUNTS)


def _check_cost(metrics: dict[str, float], question: Question) -> None:
    """Noise and cost must be stated where the run claims privacy, and must fit each other."""
    plan = question.plan
    noise_multiplier = metrics.get(messages.NOISE_MULTIPLIER, 0.0)
    if not 0 <= noise_multiplier <= question.maximum_noise_multiplier:
        raise InvalidUpdateError(Defect.NOISE)
    if not plan.claims_privacy:
        return
    epsilon, delta = metrics.get(messages.EPSILON, 0.0), metrics.get(messages.DELTA, 0.0)
    if noise_multiplier == 0:
        raise InvalidUpdateError(Defect.NOISE)
    if not 0 < delta < 1:
        raise InvalidUpdateError(Defect.METRICS)
    event = PrivacyEvent(
        sampling_rate=1.0, noise_multiplier=max(noise_multiplier, _LEAST_NOISE_ACCOUNTED), steps=1
    )
    if epsilon < _LEAST_SHARE_OF_COST * running_epsilon([event], delta=delta):
        raise InvalidUpdateError(Defect.METRICS)
