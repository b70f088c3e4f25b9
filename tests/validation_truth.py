"""What a final model really makes of the hospitals' validation patients, one patient after the other."""

from pathlib import Path

import numpy as np
import torch

from common.config import FederationConfig
from common.models.registry import build_model, load_parameters
from common.parameters import read_safetensors
from common.preprocessing import Preprocessing
from common.settings import load


def patients_said(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean softmax of each patient's first four images, (patients, classes), and the labels, (patients,)."""
    config = load(FederationConfig, folder / "config.toml")
    model = build_model(config.model_spec).eval()
    load_parameters(model, read_safetensors(folder / "model.safetensors"))
    preprocessing = Preprocessing(image_size=config.data.image_size, channels=1)
    said, targets = [], []
    with np.load(folder / "hospitals" / name / "data" / "images.npz", allow_pickle=False) as part:
        patients, images, labels = part["val_patients"], part["val_images"], part["val_labels"]
    for patient in np.unique(patients):
        mine = np.flatnonzero(patients == patient)
        assert len(set(labels[mine])) == 1
        with torch.no_grad():
            outputs = model(torch.from_numpy(preprocessing.standardise(images[mine[:4]][:, None])))
        said.append(torch.softmax(outputs.double(), dim=1).mean(dim=0).numpy())
        targets.append(labels[mine[0]])
    return np.array(said), np.array(targets)
