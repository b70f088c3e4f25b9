"""Exported files say what the model says, without any code of ours, and carry what must be known about it."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from client import cli
from client.export import export as exporting
from client.export import formats
from client.export.export import TOLERANCE, export_model, largest_difference
from client.export.formats import METADATA
from client.export.kind import ModelFormat
from client.export.network import ExportedNetwork, scaling
from client.prediction.stored_model import read_model
from common.errors import ConfigError, ModelError
from common.models.names import model_names
from common.models.plain_scattering import PlainScatteringFeatures
from common.models.registry import initial_parameters
from common.models.scattering import ScatteringFeatures
from common.preprocessing import Preprocessing
from common.scoring import image_probabilities
from tests.client.stored_models import spec_of, store

_READER = """
import json, sys
import numpy as np
kind, path, images, out = sys.argv[1:]
images = np.load(images)
if kind == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    said, told = session.run(None, {"images": images})[0], session.get_modelmeta().custom_metadata_map
else:
    import torch
    kept = {"metadata.json": ""}
    said = torch.export.load(path, extra_files=kept).module()(torch.from_numpy(images)).detach().numpy()
    told = json.loads(kept["metadata.json"])
assert not {"common", "client"} & set(sys.modules)
np.save(out, said)
print(json.dumps(told))
"""


def weights_of(spec, seed=3):
    """Weights with which answers differ from picture to picture, also of a model that starts from zero."""
    random = np.random.default_rng(seed)
    weights = initial_parameters(spec, seed)
    if spec.name == "scattering":
        weights = {n: random.normal(0, 2, w.shape).astype(np.float32) for n, w in weights.items()}
    return weights


def stored_model(folder, name, *, size=32, **more):
    spec = spec_of(name, size=size)
    return store(folder, spec, weights_of(spec), **more)


@pytest.mark.parametrize("kind", ModelFormat)
def test_other_programs_get_the_same_numbers_and_what_must_be_known(tmp_path, kind):
    point = {"threshold": 0.625, "source": "noised counts"}
    privacy = {"private": True, "epsilon_complete": True, "unit": "patient"}
    privacy["hospitals"] = {"north": {"epsilon": 2.5, "delta": 1e-4}}
    folder = stored_model(tmp_path / "run", "cnn-small", operating_point=point, privacy=privacy)
    done = export_model(folder, tmp_path / "model.bin", kind=kind)
    assert done.largest_difference <= TOLERANCE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "run"]
    stored = read_model(folder)
    images = np.random.default_rng(5).integers(0, 256, (5, 1, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images.astype(np.float32))
    words = [sys.executable, "-W", "ignore", "-c", _READER, kind.value, tmp_path / "model.bin"]
    words += [tmp_path / "images.npy", tmp_path / "said.npy"]
    ran = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    expected = image_probabilities(stored.network, stored.task, images, preprocessing=stored.preprocessing)
    assert np.ptp(expected[:, 1]) > 1e-3
    np.testing.assert_allclose(np.load(tmp_path / "said.npy"), expected, rtol=0, atol=TOLERANCE)
    told = json.loads(ran.stdout)
    assert json.loads(told["classes"]) == ["normal", "opacity"]
    assert json.loads(told["operating_point"]) == point
    assert json.loads(told["preprocessing"]) == stored.preprocessing.to_dict()
    assert json.loads(told["privacy"]) == privacy
    assert "epsilon 2.5" in json.loads(told["passport"])["Privacy"]
    assert "not a medical device" in told["use"]
    assert len(json.loads(told["limits"])) > 3
    assert told["sha256"] == stored.sha256


@pytest.mark.parametrize("loss", ["bce", "focal", "mse"])
def test_probabilities_follow_the_loss_that_the_model_was_trained_with(tmp_path, loss):
    folder = stored_model(tmp_path / "run", "softmax", size=16, loss=loss)
    exported, stored = ExportedNetwork(read_model(folder)), read_model(folder)
    images = np.random.default_rng(5).integers(0, 256, (5, 1, 16, 16), dtype=np.uint8)
    expected = image_probabilities(stored.network, stored.task, images, preprocessing=stored.preprocessing)
    said = exported(torch.from_numpy(images.astype(np.float32))).detach().numpy()
    np.testing.assert_allclose(said, expected, rtol=0, atol=TOLERANCE)
    softmax = stored.network(torch.from_numpy(stored.preprocessing.standardise(images))).softmax(1)
    assert (np.abs(softmax.detach().numpy() - expected).max() > 0.001) == (loss == "bce")
    assert (
        export_model(folder, tmp_path / "model.pt2", kind=ModelFormat.TORCH).largest_difference <= TOLERANCE
    )


def test_a_model_of_series_is_refused(tmp_path):
    spec = spec_of("lstm", size=20).model_copy(update={"steps": 3})
    form = {"kind": "visits", "steps": 3, "next_finding": False}
    folder = store(tmp_path / "run", spec, initial_parameters(spec, 0), series=form)
    with pytest.raises(ModelError, match="of series"):
        export_model(folder, tmp_path / "model.pt2", kind=ModelFormat.TORCH)
    assert not (tmp_path / "model.pt2").exists()


@pytest.mark.parametrize("size", [32, 48])
def test_scattering_has_a_form_without_fourier_transforms(size):
    features = ScatteringFeatures(channels=2, image_size=size)
    plain = PlainScatteringFeatures(features, image_size=size)
    images = torch.randn(3, 2, size, size, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    torch.testing.assert_close(plain(images), features(images), rtol=0, atol=2e-5)
    flat = torch.zeros(1, 2, size, size)
    torch.testing.assert_close(plain(flat), features(flat), rtol=0, atol=2e-3)


@pytest.mark.audit
@pytest.mark.parametrize("kind", ModelFormat)
@pytest.mark.parametrize("name", model_names())
def test_every_model_is_exported(tmp_path, name, kind):
    folder = stored_model(tmp_path / "run", name)
    assert export_model(folder, tmp_path / "model.bin", kind=kind).largest_difference <= TOLERANCE


@pytest.mark.audit
@pytest.mark.parametrize("kind", ModelFormat)
def test_scattering_of_larger_pictures_is_exported(tmp_path, kind):
    folder = stored_model(tmp_path / "run", "scattering", size=48)
    assert export_model(folder, tmp_path / "model.bin", kind=kind).largest_difference <= TOLERANCE


def test_a_file_that_says_something_else_is_not_left_behind(tmp_path, monkeypatch):
    folder = stored_model(tmp_path / "run", "softmax")
    right = formats.read

    def altered(kind, path):
        written = right(kind, path)
        return formats.Written(lambda images: written.run(images) + np.float32(3e-5), written.metadata)

    monkeypatch.setattr(exporting, "read", altered)
    with pytest.raises(ModelError, match="does not say what the model says"):
        export_model(folder, tmp_path / "model.pt2", kind=ModelFormat.TORCH)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    stored = read_model(folder)
    for wrong in (lambda images: images[:, 0, 0, :1], lambda images: np.full((len(images), 2), np.nan)):
        with pytest.raises(ModelError, match="does not say"):
            largest_difference(stored, wrong)


def test_scaling_is_that_of_training():
    prepared = Preprocessing(image_size=20, channels=3)
    scale, offset = scaling(prepared)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 20), dtype=np.uint8)
    ours = images * scale[:, None, None] + offset[:, None, None]
    np.testing.assert_allclose(ours, prepared.standardise(images), atol=1e-6)

    class PerPicture(Preprocessing):
        def standardise(self, images):
            return (images / images.max(axis=(2, 3), keepdims=True) ** 0.9).astype(np.float32) ** 2

    with pytest.raises(ModelError, match="depends on the other pixels"):
        scaling(PerPicture(image_size=20, channels=1))


def test_what_cannot_be_exported_is_said(tmp_path, monkeypatch, capsys):
    folder = stored_model(tmp_path / "run", "softmax")
    stored = read_model(folder)

    class Branching(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :2] if images.sum() > 0 else images.flatten(1)[:, 2:4]

    network = ExportedNetwork(stored)
    network.network = Branching()
    with pytest.raises(ModelError, match="cannot be exported to torch"):
        formats.write(ModelFormat.TORCH, network, 32, 1, tmp_path / "x")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    with pytest.raises(ConfigError, match="for ONNX onnx must be installed"):
        export_model(folder, tmp_path / "m.onnx", kind=ModelFormat.ONNX)
    (tmp_path / "there.onnx").write_text("mine")
    monkeypatch.setattr(
        sys, "argv", ["flower-client", "export", str(folder), "--to", str(tmp_path / "there.onnx")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "there.onnx").read_text() == "mine"
    words = ["flower-client", "export", str(folder), "--format", "torch", "--to", str(tmp_path / "m.pt2")]
    monkeypatch.setattr(sys, "argv", [*words, "--output", "json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    told = json.loads(capsys.readouterr().out)
    assert told["tolerance"] == TOLERANCE
    assert told["metadata"]["task"] == "classification"
    assert METADATA == "metadata.json"
