"""The Ray engine: Flower's own commands, the same model. A run takes about a minute: `make faults`."""

import importlib.util
import tomllib
from pathlib import Path

import pytest

from common.config import FederationConfig
from common.settings import from_flat, to_flat
from simulations.engines.ray_engine import write_app
from simulations.run import run_scenario
from simulations.scenario import make_scenario


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_app_folder_carries_the_settings_and_the_sources(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    config = FederationConfig()
    run_config = to_flat(config) | {"runtime.run-folder": "/some/run"}
    app = write_app(tmp_path / "app", run_config)
    tool = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert tool["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    flat = {
        f"{section}.{key}": value for section, keys in tool["config"].items() for key, value in keys.items()
    }
    assert from_flat(FederationConfig, flat).runtime.run_folder == "/some/run"
    # Flower's own builder takes it: names, licence, components and size are in order.
    assert len(build_fab_from_disk(app)) > 10_000


@pytest.mark.faults
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_and_embedded_end_with_the_same_model(tmp_path: Path) -> None:
    outcomes = {
        engine: run_scenario(
            make_scenario(
                {
                    "hospitals": 2,
                    "rounds": 3,
                    "image_size": 28,
                    "reproducible": True,
                    "engine": engine,
                    "out": str(tmp_path / engine),
                }
            )
        )
        for engine in ("embedded", "ray")
    }
    assert [outcome.status for outcome in outcomes.values()] == ["completed", "completed"]
    assert [outcome.result["engine"] for outcome in outcomes.values()] == ["embedded", "ray"]
    models = {outcome.result["model"]["sha256"] for outcome in outcomes.values()}
    assert len(models) == 1
    # Nothing of the SuperLink stays behind.
    assert not (tmp_path / "ray" / "flower").exists()
