import json

import pytest

from common.config import FederationConfig
from common.errors import ConfigError
from common.settings import load
from server.run_folder import RunFolder, open_run_folder
from tests.server.fake_federation import make_config


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path, new_run_id="run")


def test_rounds_without_a_checkpoint_are_dropped_and_torn_lines_too(folder):
    folder.record([{"round": 1, "hospital": "a"}, {"round": 1, "closed": 2.0}])
    folder.record([{"round": 2, "hospital": "a"}])
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "clos')
    assert [line["round"] for line in folder.metrics()] == [1, 1, 2]
    folder.forget_rounds_after(1)
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"round": 1, "hospital": "a"},
        {"round": 1, "closed": 2.0},
    ]


def test_a_number_that_is_not_finite_is_not_written(folder):
    with pytest.raises(ValueError, match="Out of range"):
        folder.record([{"round": 1, "update_norm": float("nan")}])
    assert folder.metrics() == []


def test_stop_is_a_file(folder):
    assert not folder.stop_requested
    (folder.path / "stop").touch()
    assert folder.stop_requested
    folder.forget_stop()
    folder.forget_stop()
    assert not folder.stop_requested


@pytest.mark.parametrize("text", ["0", "-1", "two", ""])
def test_an_attempt_is_a_number_from_one(folder, text):
    assert folder.attempt() == 1
    (folder.path / "attempt").write_text(text)
    with pytest.raises(ConfigError, match="attempt"):
        folder.attempt()


def test_without_a_folder_one_is_made_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config(tmp_path / "unused")
    config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"run_folder": ""})})
    with open_run_folder(config) as folder:
        assert folder.path.parent.name == "runs"
        assert folder.path.name == folder.new_run_id
    with open_run_folder(config) as other:
        assert other.new_run_id != folder.new_run_id


def test_the_kept_configuration_reads_back(tmp_path):
    config = make_config(tmp_path / "run", training={"learning-rate": 0.25})
    with open_run_folder(config) as folder:
        folder.keep_config(config)
    assert load(FederationConfig, tmp_path / "run" / "config.toml") == config
