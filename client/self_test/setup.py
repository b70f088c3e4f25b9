"""What the self-test tries things on: the run's parts, a few own patients, extreme ones beside them."""

import random
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.features import AsTheyAre, features_of
from client.training import private as private_training
from client.training.batches import chunks_of_units, rows_per_chunk, sampled_rows
from client.training.patient_optimizer import PatientDPOptimizer
from client.training.plain import make_optimizer
from common.config import PublicPlan
from common.errors import GuardError
from common.examples import Examples
from common.models.fixed_stage import FixedStage, fixed_stage, trained_stage
from common.models.registry import build_model, initial_parameters, load_parameters
from common.parameters import Parameters
from common.preprocessing import Preprocessing
from common.privacy.plan import Clipping, PrivacyPlan
from common.privacy.randomness import ReproducibleRandomness
from common.series import IMAGE, PRESENT, row_shape, select
from common.tasks import Task, task_of

FEW_ROWS = 2
"""Of a unit with many images so many are looked at."""

_MANY_PARAMETERS = 2_000_000

PRODUCTION: Any = private_training
"""Training's own names, what it imports included: tried is what it calls, whatever that is."""
Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """What a private round of this plan is made of."""

    plan: PublicPlan
    privacy: PrivacyPlan
    examples: Examples
    """The hospital's training patients."""
    device: torch.device

    @property
    def task(self) -> Task:
        """The task of the run."""
        return task_of(self.plan)

    @property
    def preprocessing(self) -> Preprocessing:
        """What is done to the inputs of `model`."""
        return (Preprocessing if self._stage is None else AsTheyAre).of(self.plan)

    arrived: Parameters | None = None
    """Weights of the round; they meet random images only (`client.self_test.checks.check_places`)."""

    @cached_property
    def weights(self) -> Parameters:
        """The weights that the self-test starts from."""
        return initial_parameters(self.plan.model_spec, seed=0)

    def of_nobody(self) -> "Setup":
        """The same with the weights that arrived and with random images instead of patients."""
        nobody = replace(self, examples=self.examples.select_units([]))
        nobody.__dict__["weights"] = self.weights if self.arrived is None else self.arrived
        return nobody

    def model(self) -> nn.Module:
        """The layers of the run's network that train, with `weights`."""
        model = self._network()
        load_parameters(model, self.weights)
        return trained_stage(model).to(self.device).train()

    def inputs_of(self, images: Examples) -> Examples:
        """What a round trains `model` on: the images, or what the network's fixed stage says of them."""
        if self._stage is None:
            return images
        preprocessing = Preprocessing.of(self.plan)
        features = features_of(self._stage, images, preprocessing=preprocessing, device=self.device)
        return replace(images, inputs={"image": features})

    @cached_property
    def _stage(self) -> FixedStage | None:
        with torch.device("meta"):
            is_fixed = fixed_stage(build_model(self.plan.model_spec)) is not None
        stage = fixed_stage(self._network()) if is_fixed else None
        return None if stage is None else stage.to(self.device)

    def _network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return build_model(self.plan.model_spec)


class Probe:
    """A few units, own and extreme, and their clipped sum by the path of training."""

    def __init__(self, setup: Setup, *, scaled: bool = True) -> None:
        self._setup = setup
        self.model = setup.model()
        with torch.no_grad():  # other weights each time, so that no tie between pixels is met twice
            for parameter in self.model.parameters() if scaled else ():
                parameter.mul_(0.9 + 0.2 * secrets.randbelow(2**20) / 2**20)
        own = few_units(setup)
        self._examples = setup.inputs_of(_with_extremes(own))
        last = self._examples.num_units - 1
        self._scaled, self._broken = last, last + 1
        self.units = list(range(last + 2))
        """Own ones, a rare class, a black image, hard contrast ten thousand times brighter, one of NaN."""
        self.ordinary = list(dict.fromkeys([0, own.num_units]))
        """The own unit with the most images, and the one of the rare class (not in large models)."""
        if is_large(self.model):
            self.ordinary = self.ordinary[:1]
        self.telling = [*self.ordinary, self._scaled, self._broken]
        """Those whose influence is looked at; the others are company."""

    def without(self, unit: int) -> list[int]:
        """All units but one."""
        return [other for other in self.units if other != unit]

    def unclipped(self, unit: int) -> tuple[Vector, float]:
        """A unit's whole gradient, and a clipping norm (64 or more) that leaves it whole."""
        clip = 64.0
        while clip < 1e9:
            gradient = self.sum_of([unit], clip=clip, clipping="flat")
            if np.linalg.norm(gradient) < 0.9 * clip:
                return gradient, clip
            clip *= 64
        raise GuardError("the gradient of an ordinary image is above 1e9")

    def sum_of(self, units: Sequence[int], *, clip: float, clipping: Clipping | None = None) -> Vector:
        """Sum of the clipped gradients of these units, (parameters,); clipped as planned unless said."""
        setup, examples = self._setup, self._examples
        clipping = clipping or setup.privacy.clipping
        privacy = replace(setup.privacy, l2_clip_norm=float(clip), enrolled_units=1, clipping=clipping)
        randomness = ReproducibleRandomness(0, "self-test")
        rows, segments = sampled_rows(
            np.array([min(unit, self._scaled) for unit in units], dtype=np.int64),
            examples.unit_rows,
            max_rows_per_unit=privacy.max_rows_per_unit,
            stream=randomness.stream(purpose="sampling", round_number=1, step=0),
        )
        unit_of_row = torch.tensor(units)[torch.from_numpy(segments)].to(setup.device)
        shape = row_shape(examples.inputs)
        most = rows_per_chunk(
            self.model,
            shape,
            physical_batch_size=setup.plan.training.physical_batch_size,
            expected_units=setup.privacy.expected_batch_size,
        )
        # At least two units go together, or nothing could be seen of one in another.
        most = max(most, 2 * FEW_ROWS)
        alone = PRODUCTION.place_matters(self.model, input_shape=shape, rows=most, fixed_kernels=False)
        with private_training.per_row_gradients(self.model, fixed_kernels=False) as wrapped:
            optimizer = PatientDPOptimizer(
                make_optimizer(
                    self.model.parameters(), setup.plan.training, learning_rate=1.0, privacy=privacy
                ),
                plan=privacy,
                randomness=randomness,
                round_number=1,
            )
            done = 0
            for chunk in chunks_of_units(rows, segments, max_rows=1 if alone else most):
                here = unit_of_row[done : done + len(chunk.rows)]
                done += len(chunk.rows)
                inputs = PRODUCTION.input_tensor(
                    examples,
                    chunk.rows,
                    preprocessing=setup.preprocessing,
                    device=setup.device,
                    filled_to=most,
                )
                inputs[: len(here)][here == self._scaled] *= 1e4
                inputs[: len(here)][here == self._broken] = float("nan")
                private_training.accumulate_clipped_gradients(
                    wrapped,
                    setup.task,
                    optimizer,
                    inputs=inputs,
                    targets=PRODUCTION.target_tensor(
                        examples, chunk.rows, device=setup.device, filled_to=most
                    ),
                    segments=torch.from_numpy(chunk.segments).to(setup.device),
                    num_units=chunk.num_units,
                )
            optimizer.settle()
            return flat(getattr(p, "summed_grad", None) for p in self.model.parameters())


def few_units(setup: Setup) -> Examples:
    """The unit with the most images and another one, a few images and one; none where there are none."""
    examples = setup.examples
    counts = np.diff(examples.unit_rows.offsets)
    present = np.flatnonzero(counts).tolist()
    chosen = dict.fromkeys([int(counts.argmax()), secrets.choice(present)]) if present else {}
    most = min(setup.privacy.max_rows_per_unit, FEW_ROWS)
    rows = [examples.unit_rows.of(unit)[: most if place == 0 else 1] for place, unit in enumerate(chosen)]
    numbers = np.concatenate([np.empty(0, np.int64), *rows])
    return Examples(
        inputs=select(examples.inputs, numbers),
        targets=examples.targets[numbers],
        units=np.repeat(np.arange(len(rows), dtype=np.int64), [len(each) for each in rows]),
        unit_ids=tuple(f"self-test {number}" for number in range(len(rows))),
    )


def _with_extremes(own: Examples) -> Examples:
    shape = own.inputs[IMAGE].shape[1:]
    generator = np.random.default_rng(secrets.randbits(64))
    rare = own.inputs[IMAGE][:1] if own.num_rows else generator.integers(0, 256, (1, *shape), dtype=np.uint8)
    contrast = 255 * generator.integers(0, 2, (1, *shape), dtype=np.uint8)
    extremes = [rare, np.zeros((1, *shape), np.uint8), contrast]
    inputs = {IMAGE: np.concatenate([own.inputs[IMAGE], *extremes])}
    for name in own.inputs.keys() - {IMAGE}:  # of series, which are as long as can be
        values = np.ones if name == PRESENT else np.zeros
        added = values((len(extremes), *own.inputs[name].shape[1:]), own.inputs[name].dtype)
        inputs[name] = np.concatenate([own.inputs[name], added])
    one = own.targets[:1] if own.num_rows else np.zeros((1, *own.targets.shape[1:]), np.int64)
    extreme_targets = [1 - one.clip(0, 1), np.zeros_like(one), np.ones_like(one)]
    return Examples(
        inputs=inputs,
        targets=np.concatenate([own.targets, *extreme_targets]).astype(np.int64),
        units=np.concatenate([own.units, own.num_units + np.arange(len(extremes))]),
        unit_ids=(*own.unit_ids, *(f"extreme {number}" for number in range(len(extremes)))),
    )


@contextmanager
def noted_gradients(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Copy what torch's own optimiser is given for `model`, step by step, whatever calls it."""
    parameters = list(model.parameters())
    seen: list[list[Tensor]] = []

    def note(optimizer: Optimizer, _arguments: Any, _named: Any) -> None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not isinstance(optimizer, PatientDPOptimizer) and own & {id(p) for p in parameters}:
            seen.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def steps_tried(model: nn.Module) -> int:
    """Steps of a round that the self-test runs: a first, a last, and one between where it costs little."""
    return 2 if is_large(model) else 3


def is_large(model: nn.Module) -> bool:
    """Whether a step takes so long that fewer of them must do."""
    return sum(parameter.numel() for parameter in model.parameters()) > _MANY_PARAMETERS


@contextmanager
def seeded_alike() -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch alike, and leave them as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - that is what is looked at
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.default_generator.manual_seed(0)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def flat(tensors: Any) -> Vector:
    """Tensors as one float64 vector."""
    each = [tensor.detach().double().cpu().numpy().ravel() for tensor in tensors]
    return np.concatenate(each)
