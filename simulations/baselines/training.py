"""Train the classical baselines of a comparison on its own parts, and score them like every other way.

Without privacy and in this process: features, classifiers and answers are kept in memory only, and of all of
it the table alone is written.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError
from common.pages.html import duration, figure
from common.series import IMAGE
from common.tasks import task_of
from simulations.baselines.classifiers import METHODS, fitted_probabilities
from simulations.baselines.features import simple_features
from simulations.comparison import SCORES, Trained, interval_of, score
from simulations.preparation import Prepared
from simulations.scenario import Scenario
from simulations.ways import Way, baseline_ways, training_examples


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Training rows of one hospital, or of several together."""

    features: NDArray[np.float32]
    targets: NDArray[np.int64]
    units: NDArray[np.int64]
    seconds: float
    """Spent on reading the pictures and on their features."""


def check_baselines(scenario: Scenario) -> None:
    """Raise ConfigError for series: features of one picture cannot speak about them."""
    if scenario.series != "none":
        raise ConfigError(
            "there are no baselines for series",
            why="their features are those of one picture",
            fix="leave --baselines out; --model last-image is the simple rival of a model of series",
        )


def train_baselines(base: Prepared, *, seed: int, say: Callable[[str], None]) -> list[Trained]:
    """Every method on all training patients and on each hospital's; Ctrl-C ends with those trained so far."""
    names = [hospital.name for hospital in base.hospitals]
    ways = baseline_ways(names, METHODS)
    trained: list[Trained] = []
    way = ways[0]
    try:
        parts = {name: _part(base, name) for name in names}
        asked = simple_features(base.held_back.sets["test"].images)
        for way in ways:
            trained.append(_train(base, way, parts, asked, seed=seed))
            if way.kind == "central":
                auc, seconds = trained[-1].metrics["auc"], trained[-1].seconds
                say(f"baseline  {way.title}: AUC {figure(auc)}, {duration(seconds)}")
    except KeyboardInterrupt:
        nothing = dict.fromkeys(SCORES)
        trained.append(Trained(way=way, status="stopped", rounds=None, metrics=nothing, ci95={}, samples={}))
    return trained


def _train(
    base: Prepared, way: Way, parts: Mapping[str, _Part], asked: NDArray[np.float32], *, seed: int
) -> Trained:
    part = _together([parts[name] for name in way.members])
    test, task = base.held_back.sets["test"], task_of(base.config)
    began = time.perf_counter()
    said = fitted_probabilities(
        way.baseline,
        task,
        features=part.features,
        targets=part.targets,
        units=part.units,
        asked=asked,
        seed=seed,
    )
    seconds = part.seconds + time.perf_counter() - began
    scores, samples = score(said, test.targets, test.units, seed=seed, task=task)
    return Trained(
        way=way,
        status="completed",
        rounds=None,
        seconds=seconds,
        metrics=scores,
        ci95={name: interval_of(values) for name, values in samples.items()},
        samples=samples,
    )


def _part(base: Prepared, hospital: str) -> _Part:
    began = time.perf_counter()
    train = training_examples(base, hospital)
    features = simple_features(train.inputs[IMAGE])
    seconds = time.perf_counter() - began
    return _Part(features=features, targets=train.targets, units=train.units, seconds=seconds)


def _together(parts: Sequence[_Part]) -> _Part:
    """All rows; no patient of one hospital is one of another."""
    if len(parts) == 1:
        return parts[0]
    first = np.cumsum([0, *(int(part.units.max(initial=-1)) + 1 for part in parts)])
    return _Part(
        features=np.concatenate([part.features for part in parts]),
        targets=np.concatenate([part.targets for part in parts]),
        units=np.concatenate([part.units + start for part, start in zip(parts, first[:-1], strict=True)]),
        seconds=sum(part.seconds for part in parts),
    )
