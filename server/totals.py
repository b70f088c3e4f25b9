"""What the server knows of each hospital's training in this run, whatever became of the updates.

An update that reached this server has left its hospital and is paid for, also when it failed a check, came
late or belongs to a round that was abandoned. A hospital charges its ledger before it trains, so the epsilon
that it states is that of all its charges in this run up to then, and the largest one counts. After its ledger
was lost in between a hospital states too little: `server.recount` composes what has really arrived.

A question that brought no believable cost stays open: behind it may stand a charge that this server knows
nothing of. An answer to a question asked later covers it, since its epsilon includes that charge.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from common import messages
from common.messages import RoundKey

_MOST_KINDS = 8
"""Different noise in one run is rare: a hospital's follows from its policy and the plan."""
_KEPT_ROUNDS = 16
"""A run falls back by at most four checkpoints; older keys never come again."""


@dataclass(frozen=True, kw_only=True)
class OpenQuestion:
    """A round that a hospital was asked to train, until its cost is known; times are Unix seconds."""

    key: str
    """Attempt, round and model: see `short_key`."""
    asked: float
    until: float
    """From then on the hospital does not begin to train for it."""


@dataclass(frozen=True, kw_only=True)
class HospitalTotals:
    """A hospital's public count and the scalars of its answers."""

    enrolled_patients: int
    rounds: int = 0
    """Rounds in which its update was aggregated."""
    releases: int = 0
    """Different updates that reached this server, aggregated or not."""
    steps: int = 0
    """Training steps in those updates."""
    epsilon: float | None = None
    """Largest epsilon of this run that it has stated believably."""
    delta: float | None = None
    noise_multiplier: float | None = None
    kinds: tuple[tuple[float, int], ...] = ()
    """Noise multiplier and steps of the different updates with a believable cost; see `server.recount`."""
    understated: bool = False
    """Whether it has stated less than those cost; found at the end of a session, never kept."""
    counted: tuple[str, ...] = ()
    """Keys of its newest updates: a repeated question brings the same update."""
    open: tuple[OpenQuestion, ...] = ()

    @property
    def epsilon_complete(self) -> bool:
        """Whether `epsilon` covers all that the hospital may have charged in this run."""
        return not self.open and not self.understated

    def asked(self, question: OpenQuestion) -> Self:
        """The totals before the question goes out."""
        return replace(self, open=(*self.open, question))

    def withdrawn(self, question: OpenQuestion) -> Self:
        """Nothing was charged for this question: it was not sent, or refused beforehand."""
        return replace(self, open=tuple(other for other in self.open if other != question))

    def answered_without_cost(self, question: OpenQuestion, *, received: float) -> Self:
        """The hospital is done with the question, and what it charged is not known."""
        rest = [
            other
            for other in self.open
            if other != question and not (other.key == question.key and other.until <= received)
        ]
        return replace(self, open=(*rest, replace(question, until=min(question.until, received))))

    def released(
        self, question: OpenQuestion, metrics: Mapping[str, float] | None, *, planned_steps: int
    ) -> Self:
        """One update more, if it is new.

        `metrics` None: its scalars are not believable, and the steps of the plan count.
        Without privacy hospitals do not repeat the plan, and there is no epsilon.
        """
        is_new = question.key not in self.counted
        known = metrics or {}
        steps = int(known.get(messages.STEPS, planned_steps))
        after = replace(
            self,
            releases=self.releases + is_new,
            steps=self.steps + (steps if is_new else 0),
            counted=_newest((*self.counted, question.key)) if is_new else self.counted,
        )
        if metrics is None:
            return after
        still_open = tuple(o for o in self.open if o.key != question.key and o.until > question.asked)
        return replace(
            after,
            epsilon=_largest(self.epsilon, known.get(messages.EPSILON)),
            delta=_largest(self.delta, known.get(messages.DELTA)),
            noise_multiplier=known.get(messages.NOISE_MULTIPLIER, self.noise_multiplier),
            kinds=_merged(self.kinds, known.get(messages.NOISE_MULTIPLIER), steps) if is_new else self.kinds,
            open=still_open,
        )


def short_key(key: RoundKey) -> str:
    """A round key within its run: attempt/round/hash."""
    return f"{key.attempt}/{key.round_number}/{key.model_hash[:16]}"


def totals_from(fields: Mapping[str, Any]) -> HospitalTotals:
    """Read totals that were written with `dataclasses.asdict`.

    Raises TypeError, ValueError, KeyError, AttributeError.
    """
    lists = {
        "kinds": tuple((float(noise), int(steps)) for noise, steps in fields.get("kinds", ())),
        "counted": tuple(fields.get("counted", ())),
        "open": tuple(OpenQuestion(**question) for question in fields.get("open", ())),
    }
    return HospitalTotals(**{**fields, **lists})


def _merged(
    kinds: tuple[tuple[float, int], ...], noise_multiplier: float | None, steps: int
) -> tuple[tuple[float, int], ...]:
    """With the steps of one update more; beyond eight kinds the two nearest become one with the larger noise.

    That costs less than both did: what is composed of it stays a lower bound, and accuses no honest hospital.
    """
    if noise_multiplier is None or not steps:
        return kinds
    known = dict(kinds)
    known[noise_multiplier] = known.get(noise_multiplier, 0) + steps
    noise = sorted(known)
    if len(noise) > _MOST_KINDS:
        low, high = min(pairwise(noise), key=lambda pair: pair[1] / pair[0])
        known[high] += known.pop(low)
    return tuple(sorted(known.items()))


def _newest(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of the last rounds."""
    newest = max(_round(key) for key in keys)
    return tuple(key for key in keys if _round(key) > newest - _KEPT_ROUNDS)


def _round(key: str) -> int:
    return int(key.split("/")[1])


def _largest(known: float | None, new: float | None) -> float | None:
    return max((value for value in (known, new) if value is not None), default=None)
