import numpy as np
import pytest

from common.config import FederationConfig
from common.errors import ModelError, WireError
from common.models.registry import initial_parameters
from common.settings import parse
from server.initial_weights import initial_weights


def config(**values):
    return parse(FederationConfig, values, source="test")


def test_a_child_process_makes_the_weights_that_the_registry_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the child finds the code wherever the server was started
    settings = config(federation={"seed": 5}, data={"image-size": 20, "classes": ["a", "b", "c"]})
    made, expected = initial_weights(settings), initial_parameters(settings.model_spec, 5)
    assert list(made) == sorted(expected)
    for name, array in expected.items():
        assert made[name].tobytes() == array.tobytes(), name


def test_a_child_that_fails_says_why():
    with pytest.raises(ModelError) as caught:
        initial_weights(config(model={"name": "no-such-model"}))
    assert "no-such-model" in caught.value.what
    assert "no-such-model" in caught.value.why


def test_a_file_must_hold_finite_float32(tmp_path):
    from safetensors.numpy import save_file

    for number, array in enumerate([np.array([np.nan], np.float32), np.zeros(2, np.float64)]):
        path = tmp_path / f"{number}.safetensors"
        save_file({"w": array}, path)
        with pytest.raises(WireError):
            initial_weights(config(runtime={"initial-weights": str(path)}))
    with pytest.raises(WireError):
        initial_weights(config(runtime={"initial-weights": str(tmp_path / "none")}))
