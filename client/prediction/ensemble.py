"""Several finished models asked about the same images: their probabilities averaged.

Every member reads and prepares the images as at its own training. Where one of them does not answer, nobody
does. The members' operating points belong to their own probabilities, so the average is decided at one half.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from client.prediction.answers import Answer, answers
from client.prediction.decisions import decisions
from client.prediction.doubts import Rule
from client.prediction.heat_method import HeatMethod
from client.prediction.inputs import Input
from client.prediction.reference import Reference
from client.prediction.stored_model import StoredModel, read_model
from common.errors import ModelError
from common.series_form import SeriesForm
from common.task_kinds import MULTI_LABEL, ORDINAL
from common.tasks import Task

ADDS_UP = (
    "The epsilons of members that were trained on the same patients add up: together they cost these "
    "patients at most the sum of epsilons at the sum of deltas (basic composition; the hospitals' ledgers "
    "may prove less)."
)
UNCLAIMED = "Nothing is claimed: a member claims no privacy, or does not know all that was charged."


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Ensemble:
    """Two or more models of one task."""

    members: tuple[StoredModel, ...]

    @property
    def task(self) -> Task:
        """What all members answer."""
        return self.members[0].task

    @property
    def form(self) -> SeriesForm:
        """What one question is, for all members."""
        return self.members[0].form

    @property
    def recalibration(self) -> None:
        """None: the members' corrections are not the average's."""
        return

    @property
    def rule(self) -> str:
        """How a decision follows from the averaged probabilities, in words."""
        what = {
            MULTI_LABEL: "each finding above 0.5",
            ORDINAL: "the highest level that is reached with a probability above 0.5",
        }.get(self.task.name, "the most probable class")
        if len(self.task.classes) == 2 and self.task.name not in (MULTI_LABEL, ORDINAL):
            what = f"{self.task.classes[1]} above 0.5"
        return (
            f"{what} in the average of {len(self.members)} models (their own operating points do not apply)"
        )

    @property
    def privacy(self) -> Mapping[str, Any]:
        """`epsilon_at_most` and `delta_at_most` of all members by basic composition, and `what` it means.

        Both are None where a member claims no privacy, or does not know all that was charged.
        """
        stated = [stated_privacy(member) for member in self.members]
        known = [pair for pair in stated if pair is not None]
        whole = len(known) == len(stated)
        epsilon = sum(pair[0] for pair in known) if whole else None
        delta = sum(pair[1] for pair in known) if whole else None
        what = ADDS_UP if whole else UNCLAIMED
        return {"epsilon_at_most": epsilon, "delta_at_most": delta, "what": what}


def stated_privacy(member: StoredModel) -> tuple[float, float] | None:
    """Largest epsilon and delta over the hospitals, as the model states them; None without a whole claim."""
    privacy = member.description.get("privacy") or {}
    entries = (privacy.get("hospitals") or {}).values()
    if not privacy.get("private") or not privacy.get("epsilon_complete") or not entries:
        return None
    pairs = [(entry.get("epsilon"), entry.get("delta")) for entry in entries]
    if any(epsilon is None or delta is None for epsilon, delta in pairs):
        return None
    return max(float(e) for e, _ in pairs), max(float(d) for _, d in pairs)


def read_models(folders: Sequence[Path]) -> StoredModel | Ensemble:
    """The model of one folder, the ensemble of several. Raises ConfigError, ModelError."""
    members = tuple(read_model(folder) for folder in folders)
    first = members[0]
    if len(members) == 1:
        return first
    if len({member.sha256 for member in members}) < len(members):
        raise ModelError("two members of the ensemble are the same model", fix="name each folder once")
    for folder, other in zip(folders[1:], members[1:], strict=True):
        mine, theirs = (first.task.name, first.task.classes), (other.task.name, other.task.classes)
        if mine != theirs or first.form != other.form:
            raise ModelError(
                f"the model in {folder} answers another question than the first one",
                why=f"it is {_question(other)}; the first is {_question(first)}",
                fix="name models of one task, with the same classes in the same order",
            )
    return Ensemble(members=members)


def ask(
    asked: StoredModel | Ensemble,
    inputs: Sequence[Input],
    *,
    max_pixels: int,
    without: frozenset[Rule] = frozenset(),
    with_pictures: bool = False,
    with_heat: HeatMethod | None = None,
    reference: Reference | None = None,
) -> Iterator[Answer]:
    """`client.prediction.answers.answers` of a model, or the average of an ensemble's, in order.

    Raises ModelError where heat is asked of an ensemble.
    """
    if with_heat is not None and isinstance(asked, Ensemble):
        raise ModelError(
            "an ensemble has no heat map",
            why="each member looks at pixels of its own",
            fix="leave out --heat-map, or ask the members one by one",
        )
    members = asked.members if isinstance(asked, Ensemble) else (asked,)
    told = [
        answers(
            member,
            inputs,
            max_pixels=max_pixels,
            without=without,
            with_pictures=with_pictures and number == 0,
            with_heat=with_heat,
            reference=reference,
        )
        for number, member in enumerate(members)
    ]
    for together in zip(*told, strict=True):
        yield together[0] if isinstance(asked, StoredModel) else _together(asked, together)


def _together(ensemble: Ensemble, told: Sequence[Answer]) -> Answer:
    """The average; the first refusal where there is one."""
    for number, (answer, member) in enumerate(zip(told, ensemble.members, strict=True), start=1):
        if answer.probabilities is None:
            whose = f"member {number} ({member.run_id}): {answer.words}"
            return replace(answer, words=whose, picture=told[0].picture)
    classes = ensemble.task.classes
    rows = [[answer.probabilities[name] for name in classes] for answer in told if answer.probabilities]
    mean = np.mean(rows, axis=0)
    return Answer(
        name=told[0].name,
        probabilities=dict(zip(classes, mean.tolist(), strict=True)),
        decision=decisions(ensemble.task, mean[None], threshold=None, thresholds=())[0],
        picture=told[0].picture,
    )


def _question(stored: StoredModel) -> str:
    about = f", {stored.form.words}" if stored.form.is_series else ""
    return f"{stored.task.name} of {', '.join(stored.task.classes)}{about}"
