"""The process that scores models on what the simulation holds back; torch runs here, never in the command.

It answers JSON requests over its pipe: make the initial weights, score one checkpoint, score the final model.
"""

import json
import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import metrics
from common.config import FederationConfig
from common.errors import FederationError
from common.parameters import Parameters, read_safetensors, write_safetensors
from common.preprocessing import Preprocessing
from common.scoring import ROWS_AT_ONCE, image_probabilities
from common.tasks import Task, task_of
from simulations.held_back import HeldBack, ScoredSet, read_held_back
from simulations.task_scoring import has_own_scores, task_evaluation

_MOST_ROC_POINTS = 200
_INTERVALS = ("auc", "accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1")

FloatArray = NDArray[np.float64]


def serve(connection: Connection, config: FederationConfig, held_back: str, num_threads: int) -> None:
    """Answer requests until the pipe closes; a request that fails is answered with `error`."""
    from simulations.engines.worker import prepare_process, receive

    prepare_process(num_threads=num_threads, deterministic=config.federation.reproducible)
    os.nice(5)  # training comes first
    scorer: Scorer | None = None
    while request := receive(connection):
        wanted = json.loads(request)
        try:
            if wanted["do"] == "initial-weights":
                answer = make_initial_weights(config, Path(wanted["path"]))
            else:
                scorer = scorer or Scorer(config, read_held_back(Path(held_back)))
                answer = scorer.answer(wanted)
        except (FederationError, OSError) as error:
            answer = {"error": str(error).splitlines()[0] if str(error) else type(error).__name__}
        connection.send_bytes(json.dumps(answer, allow_nan=False).encode())


def make_initial_weights(config: FederationConfig, path: Path) -> dict[str, Any]:
    """Write the weights of round 0: those that the server's own child process would make."""
    from common.models.registry import initial_parameters

    write_safetensors(path, initial_parameters(config.model_spec, config.federation.seed))
    return {}


class Scorer:
    """One model's place in memory, and the held-back splits."""

    def __init__(self, config: FederationConfig, held_back: HeldBack) -> None:
        from common.models.fixed_stage import fixed_stage, trained_stage
        from common.models.registry import build_model

        self.held_back = held_back
        self.task: Task = task_of(config)
        self._preprocessing = Preprocessing(image_size=config.data.image_size, channels=config.data.channels)
        self._model = build_model(config.model_spec).eval()
        self._stage, self._trained = fixed_stage(self._model), trained_stage(self._model)
        self._features: dict[str, list[Any]] = {}
        self._seed = config.federation.seed
        self._takes_average = config.server.final_model == "ema"

    def answer(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Scores of the weights in `wanted["path"]`: one line per split, or everything of the final model."""
        from common.models.registry import load_parameters

        is_checkpoint = wanted["do"] == "checkpoint"
        path = Path(wanted["path"])
        load_parameters(self._model, self._checkpoint(path) if is_checkpoint else read_safetensors(path))
        said = {name: self._probabilities(name) for name in self.held_back.sets}
        if is_checkpoint:
            return {
                name: self.task.metrics(said[name], scored.targets)
                for name, scored in self.held_back.sets.items()
            }
        return {
            "splits": {
                name: self._evaluation(said[name], scored) for name, scored in self.held_back.sets.items()
            },
            "hospitals": self._hospitals(said, wanted["hospitals"]),
        }

    def _evaluation(self, said: FloatArray, scored: ScoredSet) -> dict[str, Any]:
        if has_own_scores(self.task):
            return task_evaluation(self.task, said, scored.targets, scored.units, seed=self._seed)
        return evaluation(said, scored, classes=self.task.classes, seed=self._seed)

    def _checkpoint(self, folder: Path) -> Parameters:
        """The model that the run would hand out at a checkpoint: its last one, or the moving average."""
        if not self._takes_average:
            return read_safetensors(folder / "model.safetensors")
        arrays = read_safetensors(folder / "optimizer.safetensors")
        prefix = "average/"
        return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    def _probabilities(self, split: str) -> FloatArray:
        import torch

        images = self.held_back.sets[split].images
        if self._stage is None:
            return image_probabilities(self._model, self.task, images, preprocessing=self._preprocessing)
        with torch.inference_mode():
            outputs = [self._trained(rows).numpy() for rows in self._features_of(split)]
        return self.task.probabilities(np.concatenate(outputs))

    def _features_of(self, split: str) -> list[Any]:
        """What goes into the layers that train, ROWS_AT_ONCE rows at a time; computed once."""
        import torch

        if split not in self._features and self._stage is not None:
            images = self.held_back.sets[split].images
            self._features[split] = [
                self._stage(torch.from_numpy(self._preprocessing.standardise(images[at : at + ROWS_AT_ONCE])))
                for at in range(0, len(images), ROWS_AT_ONCE)
            ]
        return self._features[split]

    def _hospitals(self, said: Mapping[str, FloatArray], names: list[str]) -> dict[str, Any]:
        """Scores on each hospital's own kind of test patients, where the data say whose they are."""
        test = self.held_back.sets["test"]
        result = {}
        for position, name in enumerate(names):
            mine = test.hospitals == position
            if mine.any():
                scores = self.task.metrics(said["test"][mine], test.targets[mine])
                counts = {"images": int(mine.sum()), "patients": len(np.unique(test.units[mine]))}
                result[name] = scores | counts
        return result


def evaluation(
    probabilities: FloatArray, scored: ScoredSet, *, classes: tuple[str, ...], seed: int
) -> dict[str, Any]:
    """All that the report shows of one split: metrics, 95 % intervals by patient, curves. Aggregates only."""
    targets = scored.targets
    bins = metrics.calibration_bins(probabilities, targets)
    intervals = metrics.bootstrap_ci(
        probabilities, targets, units=scored.units, metrics=_INTERVALS, seed=seed
    )
    return {
        "metrics": metrics.classification_metrics(probabilities, targets),
        "ci95": {name: interval and list(interval) for name, interval in intervals.items()},
        "roc": _roc(probabilities, targets, classes),
        "calibration": {
            "mean_predicted": [place.mean_probability for place in bins],
            "fraction_positive": [place.observed for place in bins],
            "count": [place.count for place in bins],
        },
        "ece": metrics.expected_calibration_error(probabilities, targets),
        "confusion": metrics.confusion_matrix(probabilities, targets).tolist(),
        "classes": list(classes),
        "images": len(targets),
        "patients": len(np.unique(scored.units)),
    }


def _roc(probabilities: FloatArray, targets: NDArray[np.int64], classes: tuple[str, ...]) -> dict[str, Any]:
    """One curve for the finding of two classes, else one per class; thinned out."""
    if len(classes) == 2:
        return _curve(probabilities, targets, positive=1)
    return {name: _curve(probabilities, targets, positive=index) for index, name in enumerate(classes)}


def _curve(probabilities: FloatArray, targets: NDArray[np.int64], *, positive: int) -> dict[str, list[float]]:
    points = metrics.roc_points(probabilities, targets, positive=positive)
    if points is None:
        return {"fpr": [], "tpr": []}
    kept = np.unique(np.linspace(0, len(points[0]) - 1, _MOST_ROC_POINTS).astype(np.int64))
    return {"fpr": np.round(points[0][kept], 5).tolist(), "tpr": np.round(points[1][kept], 5).tolist()}
