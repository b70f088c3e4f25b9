"""Small models as a run leaves them, and phantoms as films."""

import json
from pathlib import Path

import numpy as np
import torch

from client.images.phantoms import hospital_phantoms
from common.config import ModelSpec
from common.models.registry import build_model, initial_parameters, read_parameters
from common.parameters import parameters_sha256, write_safetensors
from common.preprocessing import Preprocessing

CLASSES = ("normal", "opacity")
SIZE = 32


def spec_of(name="cnn-small", *, size=SIZE, channels=1, classes=CLASSES) -> ModelSpec:
    outputs = len(classes)
    return ModelSpec(name=name, activation="relu", channels=channels, image_size=size, num_outputs=outputs)


def store(folder: Path, spec: ModelSpec, weights=None, *, classes=CLASSES, result=None, **more) -> Path:
    """Write model.json, the weights and, with `result`, result.json; `more` replaces keys of model.json."""
    folder.mkdir(parents=True)
    weights = initial_parameters(spec, 0) if weights is None else weights
    write_safetensors(folder / "model.safetensors", weights)
    preprocessing = Preprocessing(image_size=spec.image_size, channels=spec.channels)
    description = {
        "run_id": "lungs-1",
        "rounds": 3,
        "task": "classification",
        "classes": list(classes),
        "spec": spec.model_dump(mode="json", by_alias=True),
        "preprocessing": preprocessing.to_dict(),
        "sha256": parameters_sha256(weights),
        "operating_point": None,
        "calibration": [],
        "privacy": {"private": False, "epsilon": None},
    }
    (folder / "model.json").write_text(json.dumps(description | more))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def train_on_phantoms(spec: ModelSpec, *, patients=150, epochs=8, seed=0):
    """Weights of a model that finds most opacities; seconds at 64 px, from three hospitals."""
    films = [
        hospital_phantoms(hospital=h, num_patients=patients, image_size=spec.image_size, seed=seed + 1)
        for h in range(3)
    ]
    preprocessing = Preprocessing(image_size=spec.image_size, channels=1)
    inputs = torch.from_numpy(
        preprocessing.standardise(np.concatenate([film.images for film in films])[:, None])
    )
    labels = torch.from_numpy(np.concatenate([film.labels for film in films]))
    random = torch.Generator().manual_seed(seed)
    network = build_model(spec)
    with torch.no_grad():
        for name, weight in initial_parameters(spec, seed).items():
            network.get_parameter(name).copy_(torch.from_numpy(weight))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=random).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    return read_parameters(network)
