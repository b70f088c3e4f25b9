"""A model as a run folder or a hospital keeps it, with its preprocessing, classes and operating point."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.prediction.decisions import rule, stored_thresholds
from common.config import ModelSpec
from common.errors import ConfigError, FederationError, ModelError
from common.files import manifest_problem
from common.preprocessing import Preprocessing
from common.settings import parse
from common.task_kinds import CLASSIFICATION
from common.tasks import Task, make_task

if TYPE_CHECKING:
    from torch import nn

WEIGHTS, DESCRIPTION, RESULT, MANIFEST = "model.safetensors", "model.json", "result.json", "manifest.json"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StoredModel:
    """A model that can answer."""

    network: "nn.Module"
    """On the CPU, in evaluation mode."""
    spec: ModelSpec
    task: Task
    preprocessing: Preprocessing
    threshold: float | None
    """Of two classes the finding is called where its probability is at least this; None: none is stored."""
    description: Mapping[str, Any]
    """What model.json says."""
    result: Mapping[str, Any]
    """What result.json says; empty where a hospital keeps none."""

    @property
    def run_id(self) -> str:
        """The run that made the model."""
        return str(self.description.get("run_id", ""))

    @property
    def sha256(self) -> str:
        """Hash of the weights, `common.parameters.parameters_sha256`."""
        return str(self.description["sha256"])

    @property
    def rule(self) -> str:
        """How a decision follows from probabilities, in words."""
        return rule(self.task, threshold=self.threshold, thresholds=self.thresholds)

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """Of several findings the operating point of each, None where it has none; empty where none has."""
        return stored_thresholds(self.description, self.task)


def read_model(folder: Path) -> StoredModel:
    """Read model.json and the weights of `folder`. Raises ConfigError, ModelError where that cannot be."""
    if not (folder / DESCRIPTION).is_file() or not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"{folder} holds no finished model",
            why=f"{DESCRIPTION} and {WEIGHTS} are written at the end of a run",
            fix="name a run folder, or one that `flower-client models` lists",
        )
    if (folder / MANIFEST).is_file() and (problem := manifest_problem(folder)):
        raise ModelError(f"the model in {folder} is damaged", why=problem, fix="fetch or copy it again")
    description = _json(folder / DESCRIPTION)
    try:
        return _stored(folder, description)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / DESCRIPTION} does not describe a model that this version can use",
            why=str(error),
            fix="use the release that trained it",
        ) from None


def _stored(folder: Path, description: Mapping[str, Any]) -> StoredModel:
    spec = parse(ModelSpec, description["spec"], source=str(folder / DESCRIPTION))
    preprocessing = Preprocessing.from_dict(description["preprocessing"])
    loss = str(description.get("loss", ""))  # probabilities of a classification depend on it
    task = make_task(str(description["task"]), [str(name) for name in description["classes"]], loss=loss)
    stored_thresholds(description, task)
    wanted = (preprocessing.channels, preprocessing.image_size, task.num_outputs)
    if wanted != (spec.channels, spec.image_size, spec.num_outputs):
        raise ValueError("the network, its preprocessing and its classes do not belong together")
    point = description.get("operating_point")
    threshold = None if point is None else float(point["threshold"])
    if threshold is not None and not (
        0 <= threshold <= 1 and task.name == CLASSIFICATION and len(task.classes) == 2
    ):
        raise ValueError(f"operating point {threshold} of {len(task.classes)} classes")
    result = _json(folder / RESULT) if (folder / RESULT).is_file() else {}
    return StoredModel(
        network=_network(folder / WEIGHTS, spec, sha256=str(description["sha256"])),
        spec=spec,
        task=task,
        preprocessing=preprocessing,
        threshold=threshold,
        description=description,
        result=result,
    )


def _network(path: Path, spec: ModelSpec, *, sha256: str) -> "nn.Module":
    from common.models.registry import build_model, load_parameters, parameter_template
    from common.parameters import parameters_sha256, read_safetensors

    try:
        weights = read_safetensors(path, parameter_template(spec))
    except ModelError:
        raise
    except FederationError as error:
        raise ModelError(f"{path} cannot be used", why=error.what, fix="fetch or copy it again") from None
    if parameters_sha256(weights) != sha256:
        raise ModelError(
            f"{path} is not the model that {DESCRIPTION} describes",
            why="its hash is another one",
            fix="fetch or copy the folder again",
        )
    network = build_model(spec).eval()
    load_parameters(network, weights)
    return network


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{path} cannot be read", why=str(error), fix="fetch or copy it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} cannot be read", why="it is no JSON object", fix="fetch or copy it again")
    return content
