"""What `pyproject.toml` promises to Flower and to pip."""

import tomllib
from pathlib import Path

from common.config import FederationConfig
from common.settings import from_flat, to_flat

PYPROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())
APP = PYPROJECT["tool"]["flwr"]["app"]


def flat_run_config():
    sections = APP["config"].items()
    return {f"{section}.{key}": value for section, keys in sections for key, value in keys.items()}


def test_flower_knows_every_setting_so_that_any_can_be_overridden():
    assert set(flat_run_config()) == set(to_flat(FederationConfig()))


def test_flowers_own_run_is_a_valid_private_federation():
    config = from_flat(FederationConfig, flat_run_config())
    assert config.claims_privacy
    assert config.data.classes == ("normal", "opacity")


def test_the_apps_are_the_ones_that_the_readme_names():
    assert APP["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}


def test_the_three_commands_exist():
    assert set(PYPROJECT["project"]["scripts"]) == {"flower-server", "flower-client", "flower-simulate"}
