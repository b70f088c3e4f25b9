"""Neighbour audits: whatever one patient's images are, adding the patient moves what is noised by at most C.

White-box: the sum that the optimiser holds just before the noise. Black-box: the same from the update alone,
with a noise multiplier so small that it hides nothing. A bound on the sensitivity itself, no statistics.
Source: Tramer et al., Debugging Differential Privacy, arXiv 2202.12219.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray
from torch import nn

from common.config import ModelSpec
from common.examples import Examples
from common.models.names import MODELS
from common.models.registry import build_model, initial_parameters, load_parameters
from common.preprocessing import Preprocessing
from common.privacy.plan import Clipping
from common.privacy.randomness import ReproducibleRandomness
from common.series import IMAGE, PRESENT, YEARS
from common.tasks import Task
from simulations.audits.finding import Finding
from simulations.audits.movements import (
    ROUNDING,
    WITHOUT_EFFECT,
    Moved,
    in_a_large_layer,
    largest_noise,
    over_several_steps,
    that_cancels,
    with_a_tiny_clip,
    with_chosen_weights,
)
from simulations.audits.probe import TASK, make_plan, noisy_sums
from simulations.audits.released_steps import Vector, watched_steps

KINDS = ("scaled", "nan", "infinite", "rare class", "duplicate", "black", "many images", "alone", "nothing")
RAGGED = (1, 3, 1, 2, 4, 1)
"""Images of each of the others."""
SIZE = 28
STEPS = 3
"""Longest series, for the models of series."""
SHORT = 0.1
"""Automatic clipping brings a gradient of norm 0.09 or more so near to the bound."""
SCALED, NAN, INFINITE = 251, 252, 253
"""Values of the first pixel that make a record what no decoder would."""
BROKEN_PIXEL = 3


class Hostile(Preprocessing):
    """Lets records through that are scaled by 10,000 or not finite, as a defective decoder might."""

    def standardise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """As production, then the marked records."""
        values, marks = super().standardise(images), images[:, 0, 0, 0]
        if images.shape[-1] <= BROKEN_PIXEL:  # single shades: what black and white are
            return values
        values[marks == SCALED] *= 1e4
        values[marks == NAN, 0, BROKEN_PIXEL, BROKEN_PIXEL] = np.nan
        values[marks == INFINITE, 0, BROKEN_PIXEL, BROKEN_PIXEL] = np.inf
        return values


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: which network, clip and chunk, and how small the hospital is."""

    model: str
    clip: float
    chunk: int
    """Rows computed at once."""
    size: int = SIZE
    lengths: tuple[int, ...] = RAGGED
    rows_of_odd: int = 2
    """Images of the patient who is added."""
    task: Task = TASK
    clipping: Clipping = "flat"
    augmentations: int = 1

    @property
    def steps(self) -> int | None:
        """Longest series; None where records are single images."""
        return STEPS if MODELS[self.model].series else None

    @property
    def network(self) -> nn.Module:
        """The network at its first weights."""
        spec = ModelSpec(
            name=self.model, channels=1, image_size=self.size, num_outputs=2, steps=self.steps or 1
        )
        model = build_model(spec)
        load_parameters(model, initial_parameters(spec, seed=1))
        return model


def hospital(kind: str, case: Case, *, with_patient: bool) -> Examples:
    """Patients with random films; the last one, when there, is `kind` of odd."""
    rng = np.random.default_rng(5)
    lengths = () if kind in ("alone", "nothing") else case.lengths
    lengths = (*lengths, {"many images": 9, "nothing": 0}.get(kind, case.rows_of_odd))
    units = np.repeat(np.arange(len(lengths)), lengths)
    series = () if case.steps is None else (case.steps,)
    images = rng.integers(0, 200, (len(units), *series, 1, case.size, case.size), dtype=np.uint8)
    targets, odd = rng.integers(0, 2, len(units)), units == len(lengths) - 1
    if kind in ("scaled", "alone"):
        images[odd, ..., 0, 0, 0] = SCALED
    elif kind in ("nan", "infinite"):
        images[np.flatnonzero(odd)[:1], ..., 0, 0, 0] = NAN if kind == "nan" else INFINITE
    elif kind == "rare class":
        targets[:], targets[odd] = 0, 1
    elif kind == "duplicate":
        images[odd], targets[odd] = images[0], targets[0]
    elif kind == "black":
        images[odd] = 0
    everybody = Examples(
        inputs={IMAGE: images} | ({} if case.steps is None else _times(rng, len(units), case.steps)),
        targets=targets,
        units=units,
        unit_ids=tuple(str(number) for number in range(len(lengths))),
    )
    return everybody if with_patient else everybody.select_units(np.arange(len(lengths) - 1))


def _times(rng: np.random.Generator, rows: int, steps: int) -> dict[str, NDArray[np.float32]]:
    """Series of unequal length, the last as long as can be."""
    lengths = rng.integers(1, steps + 1, rows)
    lengths[-1:] = steps
    present = np.arange(steps) < lengths[:, None]
    years = present * rng.exponential(2.0, (rows, steps)) * (np.arange(steps) > 0)
    return {PRESENT: present.astype(np.float32), YEARS: years.astype(np.float32)}


See = Callable[[Case, Examples], Vector]


def clipped_sum(case: Case, examples: Examples) -> Vector:
    """White-box: what the production path holds just before the noise of a step that everybody enters."""
    with watched_steps() as steps:
        noisy_sums(
            model=case.network,
            examples=examples,
            plan=make_plan(l2_clip_norm=case.clip, clipping=case.clipping),
            augmentations=case.augmentations,
            preprocessing=Hostile(image_size=case.size, channels=1),
            task=case.task,
            physical_batch_size=case.chunk,
            randomness=ReproducibleRandomness(3, "here"),
        )
    (step,) = steps
    return step.clipped_sum


def released_sum(case: Case, examples: Examples) -> Vector:
    """Black-box: the same from the weights of the update, but for hardly any noise."""
    # A step so large that the old weights do not show in the float32 of the new ones.
    plan = make_plan(l2_clip_norm=case.clip, clipping=case.clipping)
    return noisy_sums(
        model=case.network,
        examples=examples,
        plan=plan,
        learning_rate=1e4 * plan.enrolled_units / case.clip,
        preprocessing=Hostile(image_size=case.size, channels=1),
        task=case.task,
        physical_batch_size=case.chunk,
        augmentations=case.augmentations,
    )


def movement(see: See, kind: str, case: Case) -> float:
    """By how much the patient moves the sum, in units of C; nan where a sum is not finite."""
    there, away = (
        see(case, hospital(kind, case, with_patient=with_patient)) for with_patient in (True, False)
    )
    return float(np.linalg.norm(there - away)) / case.clip


def audit_neighbours(
    *,
    models: Sequence[str] = ("softmax", "cnn-small", "cnn-flatten"),
    kinds: Sequence[str] = KINDS,
    clips: Sequence[float] | None = None,
    chunks: Sequence[int] = (1, 3, 256),
    size: int = SIZE,
    lengths: tuple[int, ...] = RAGGED,
    clipping: Clipping = "flat",
    augmentations: int = 1,
) -> Finding:
    """White-box: no patient moves the clipped sum by more than C(1 + 1e-5).

    clips: None for 0.05, and also 1 where gradients are that long: a bound that is not reached shows nothing.
    """
    cases = [
        replace(case, clipping=clipping, augmentations=augmentations)
        for case in _cases(models, clips, chunks, size=size, lengths=lengths)
    ]
    return _judged("neighbours", [_moved(clipped_sum, kind, case) for kind, case in product(kinds, cases)])


def audit_neighbours_black_box(
    *,
    models: Sequence[str] = ("softmax", "cnn-small"),
    kinds: Sequence[str] = KINDS,
    clips: Sequence[float] = (0.05,),
    chunks: Sequence[int] = (3, 256),
) -> Finding:
    """Black-box: no patient moves the update by more than C, nor that of several steps by several times C."""
    cases = _cases(models, clips, chunks)
    moved = [_moved(released_sum, kind, case) for kind, case in product(kinds, cases)]
    moved += [over_several_steps(), with_chosen_weights(), that_cancels(), with_a_tiny_clip()]
    moved.append(in_a_large_layer())
    return _judged("neighbours, black box", moved, black_box=True)


def _moved(see: See, kind: str, case: Case) -> Moved:
    weights = sum(parameter.numel() for parameter in case.network.parameters())
    noise = largest_noise(weights) if see is released_sum else 0.0
    short = SHORT if case.clipping == "automatic" else 0.0
    return Moved(kind=kind, by=movement(see, kind, case), tolerance=ROUNDING + noise, short=short)


def _cases(
    models: Sequence[str],
    clips: Sequence[float] | None,
    chunks: Sequence[int],
    *,
    size: int = SIZE,
    lengths: tuple[int, ...] = RAGGED,
) -> list[Case]:
    return [
        Case(model=model, clip=clip, chunk=chunk, size=size, lengths=lengths)
        for model in models
        for clip, chunk in product(clips or _reached_clips(model), chunks)
    ]


def _reached_clips(model: str) -> tuple[float, ...]:
    short = model == "scattering" or MODELS[model].series
    return (0.05,) if short else (0.05, 1.0)


def _judged(audit: str, moved: Sequence[Moved], *, black_box: bool = False) -> Finding:
    too_far = sorted({m.kind for m in moved if not m.allowed})
    slack = sorted({m.kind for m in moved if not m.reached})
    holding = [m.by for m in moved if m.kind not in WITHOUT_EFFECT]
    said = (
        f"In {len(moved)} pairs of hospitals that differ in one patient, no patient moved the sum beyond C."
    )
    if slack:
        said = f"The bound was not reached, so this audit shows nothing: {', '.join(slack)}."
    if too_far:
        said = f"A patient moves the sum beyond what the noise is made for: {', '.join(too_far)}."
    return Finding(
        audit=audit,
        passed=not too_far and not slack,
        said=said,
        numbers={
            "pairs": len(moved),
            "largest movement over C": _largest(holding),
            "largest movement of a patient who must count as zero": _largest(
                m.by for m in moved if m.kind in WITHOUT_EFFECT
            ),
        },
        black_box=black_box,
    )


def _largest(values: "Iterator[float] | Sequence[float]") -> float:
    """The largest, nan when there is one; 0.0 for none."""
    return float(np.max([0.0, *values]))
