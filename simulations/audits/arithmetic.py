"""Audits of the arithmetic of an update, from outside: it is DP-SGD of these patients, and nothing besides.

With a noise multiplier that hides nothing an update is a known function of films and plan. Three questions to
it: whether it equals DP-SGD done the slow way, whether a round that broke off leaves anything to the next,
and whether the noised numbers lie on the public grid (`common.privacy.noise`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import client.training.private
from common.config import ModelSpec, TrainingConfig
from common.examples import Examples
from common.models import registry
from common.preprocessing import Preprocessing
from common.privacy.noise import NoiseGrid
from common.privacy.plan import PrivacyPlan
from simulations.audits.finding import Finding
from simulations.audits.probe import (
    CLIP,
    TASK,
    FromBlack,
    blank_network,
    lit_films,
    make_plan,
    noisy_sums,
    production_randomness,
    table,
)

SIZE = 14
RAGGED = (1, 3, 1, 2, 4, 1)
"""Images of each patient."""
TRAINING = TrainingConfig(learning_rate=0.5, weight_decay=0.2, momentum=0.5, physical_batch_size=4)
TOLERANCE = 2e-3
"""Of the length of an update: what float32, the grid and the little noise may change."""
_EARLY, _LATE = 3, 7
_WIDE, _POINTS = 1024.0, 20
"""Clip of the grid's audit, and bits of its noise in points of the grid."""
_FINE = 24
"""Bits of a float32: coarser numbers of the grid survive in an update as they are."""

Weights = Mapping[str, NDArray[np.float32]]


def audit_slow_training(
    *, models: Sequence[str] = ("softmax", "cnn1"), clips: Sequence[float] = (CLIP, 3.0)
) -> Finding:
    """Black-box: an update equals that of plain autograd, patient by patient, and holds nothing else."""
    units = np.repeat(np.arange(len(RAGGED)), RAGGED)
    rng = np.random.default_rng(4)
    examples = table(rng.integers(0, 256, (len(units), 1, SIZE, SIZE), dtype=np.uint8), units % 2, units)
    worst, unknown = 0.0, set()
    for name, clip in product(models, clips):
        spec = ModelSpec(name=name, channels=1, image_size=SIZE, num_outputs=2)
        start = registry.initial_parameters(spec, 1)
        plan = make_plan(l2_clip_norm=clip, steps=3)
        fast, slow = _trained(spec, start, examples, plan), _slowly_trained(spec, start, examples, plan)
        unknown |= set(fast) ^ set(start)
        away = _length({name: fast[name] - slow[name] for name in start if name in fast})
        worst = max(
            worst, float(np.nan_to_num(away / _length({n: slow[n] - start[n] for n in start}), nan=np.inf))
        )
    passed = worst <= TOLERANCE and not unknown
    said = "An update is what training each patient alone with autograd gives, and nothing besides."
    if unknown:
        said = f"An update holds other things than the weights: {', '.join(sorted(unknown))}."
    elif not passed:
        said = f"An update is off by {worst:.2g} of its length from training each patient alone."
    return Finding(
        audit="slow training",
        passed=passed,
        said=said,
        numbers={"difference over length of the update": worst, "other things in an update": len(unknown)},
        black_box=True,
    )


def audit_interrupted_round() -> Finding:
    """Black-box: after a round that broke off in mid-batch a patient moves the next by at most C."""
    side, pixels = 4, np.arange(6)
    moved = 0.0
    for early in (_EARLY, _LATE):
        there, away = (
            _after_an_error(lit_films(lit, side), side, fails_at=early) for lit in (pixels, pixels[1:])
        )
        moved = max(moved, float(np.linalg.norm(there - away)) / CLIP)
    passed = moved <= 1 + TOLERANCE
    said = "A round that broke off in the middle of a batch leaves nothing to the next one."
    return Finding(
        audit="interrupted round",
        passed=passed,
        said=said if passed else f"After a round that broke off a patient moves the update by {moved:.2f} C.",
        numbers={"movement over C": moved},
        black_box=True,
    )


def audit_grid_black_box(*, rounds: int = 4) -> Finding:
    """Black-box: every number of an update is a whole number of the public grid, films and noise added up."""
    side = 8
    # Divisor and step size are powers of two and the weights start at zero, so nothing is rounded on its way
    # out. The clip is so wide that films and noise are few enough points of its grid for a float32.
    spacing = _grid(make_plan(l2_clip_norm=_WIDE), side).spacing
    plan = make_plan(l2_clip_norm=_WIDE, noise_multiplier=2.0**_POINTS * spacing / _WIDE, enrolled_units=16)
    spacing = _grid(plan, side).spacing
    seen = np.concatenate(
        [
            noisy_sums(
                model=blank_network(side),
                examples=lit_films(np.arange(5), side),
                plan=plan,
                learning_rate=16.0,
                round_number=number,
            )
            for number in range(1, rounds + 1)
        ]
    )
    in_points = seen / spacing
    if np.abs(in_points).max() >= 2.0**_FINE:
        raise AssertionError("the noise of this audit is too large for float32: its grid cannot be seen")
    beside = float(np.mean(in_points != np.rint(in_points)))
    said = f"All {len(seen)} numbers lie on the public grid, noise included."
    return Finding(
        audit="grid",
        passed=beside == 0,
        said=said
        if beside == 0
        else f"{100 * beside:.0f} % of the noised numbers lie beside the public grid.",
        numbers={"numbers": len(seen), "share beside the grid": beside},
        black_box=True,
    )


def _grid(plan: PrivacyPlan, side: int) -> NoiseGrid:
    return NoiseGrid.of(plan, num_parameters=2 * side * side)


@dataclass(frozen=True, kw_only=True)
class _BreakingDecoder(FromBlack):
    """Fails after some chunks, as on a file that cannot be read."""

    chunks: Iterator[int]

    def standardise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """As production, until no chunk is left."""
        if next(self.chunks, None) is None:
            raise _UnreadableError
        return super().standardise(images)


class _UnreadableError(Exception):
    """A file could not be read."""


def _after_an_error(examples: Examples, side: int, *, fails_at: int) -> NDArray[np.float64]:
    """The update of a round after one of the same network broke off at chunk `fails_at`, a patient each."""
    model, plan = blank_network(side), make_plan(steps=2, max_rows_per_unit=1)  # one patient a chunk
    broken = _BreakingDecoder(image_size=side, channels=1, chunks=iter(range(fails_at - 1)))
    try:
        noisy_sums(model=model, examples=examples, plan=plan, preprocessing=broken, physical_batch_size=1)
    except _UnreadableError:
        nn.init.zeros_(next(model.parameters()))
    else:
        raise AssertionError("the round was to break off")
    return noisy_sums(model=model, examples=examples, plan=make_plan(), physical_batch_size=1)


def _trained(spec: ModelSpec, start: Weights, examples: Examples, plan: PrivacyPlan) -> Weights:
    model = registry.build_model(spec)
    registry.load_parameters(model, dict(start))
    result = client.training.private.train_privately(
        model=model,
        task=TASK,
        examples=examples,
        preprocessing=Preprocessing(image_size=SIZE, channels=1),
        plan=plan,
        training=TRAINING,
        round_number=1,
        num_rounds=1,
        randomness=production_randomness(),
        device=torch.device("cpu"),
    )
    return result.parameters


def _slowly_trained(spec: ModelSpec, start: Weights, examples: Examples, plan: PrivacyPlan) -> Weights:
    """DP-SGD without noise by hand: Abadi et al., arXiv 1607.00133, algorithm 1, patient by patient."""
    model = registry.build_model(spec)
    registry.load_parameters(model, dict(start))
    # By hand as well, for a constant in production that came from the patients would be one here.
    images = torch.from_numpy((examples.inputs["image"].astype(np.float32) / 255 - 0.5) / 0.25)
    targets, parameters = torch.from_numpy(examples.targets), list(model.parameters())
    moments: list[Any] = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    for _ in range(plan.steps):
        total = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
        for rows in examples.rows_of_units():
            loss = nn.functional.cross_entropy(model(images[rows]), targets[rows])
            gradients = [g.double() for g in torch.autograd.grad(loss, parameters)]
            norm = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
            for whole, gradient in zip(total, gradients, strict=True):
                whole += gradient * min(1.0, plan.l2_clip_norm / norm)
        with torch.no_grad():
            for parameter, moment, whole in zip(parameters, moments, total, strict=True):
                moment.mul_(TRAINING.momentum).add_(whole / (plan.sampling_rate * plan.enrolled_units))
                parameter.mul_(1 - TRAINING.learning_rate * TRAINING.weight_decay)
                parameter.sub_((TRAINING.learning_rate * moment).float())
    return registry.read_parameters(model)


def _length(parts: Mapping[str, NDArray[Any]]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(part, dtype=np.float64)) for part in parts.values())))
