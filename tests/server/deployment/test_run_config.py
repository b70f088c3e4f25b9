"""The way of a setting from the operator's federation.toml to the run: nothing is forgotten on it."""

import pytest

from common import messages
from common.config import FederationConfig, PublicPlan
from common.settings import from_flat, to_flat
from server.deployment.server_process import run_config
from server.provisioning.new_federation import make_federation, plan_federation
from server.reporting.run_record import read_config
from server.run_folder import RunFolder
from tests.server.fake_federation import FakeGrid, make_config, result_of, run, three_hospitals

OTHER_THAN_BUILT_IN = {
    "federation": {"name": "chest", "rounds": 7},
    "data": {"classes": ["normal", "pneumonia", "other"], "image-size": 64},
    "preprocessing": {"crop": "centre", "crop-share": 0.9},
    "model": {"activation": "relu"},
    "augmentation": {"flip": "horizontal", "shift": 0.05},
    "training": {"learning-rate": 0.125, "momentum": 0.5},
    "privacy": {"sampling-rate": 0.25, "local-steps": 3},
    "evaluation": {"at-end": False, "checkpoints": 2, "score-bins": 20},
    "wire": {"bits": 4},
    "server": {"quorum": 3, "deadline-s": 77.0},
    "network": {"address": "fl.example.org:8443"},
}


@pytest.fixture
def folder(tmp_path):
    return make_federation(tmp_path / "operator", plan_federation(OTHER_THAN_BUILT_IN))


def test_every_section_reaches_the_runs_config_toml(folder, tmp_path):
    written = folder.config()
    for name in PublicPlan.model_fields:  # a section that comes later needs its line above
        assert getattr(written, name) != getattr(FederationConfig(), name), name
    given = run_config(written, folder, tmp_path / "run")
    taken = from_flat(FederationConfig, to_flat(given))  # as the ServerApp reads Flower's run config
    RunFolder(tmp_path / "run", new_run_id="new").keep_config(taken)
    kept = read_config(tmp_path / "run" / "config.toml")
    for name in FederationConfig.model_fields.keys() - {"runtime"}:
        assert getattr(kept, name) == getattr(written, name), name
    assert kept.runtime.run_folder == str(tmp_path / "run")
    assert kept.runtime.roster == str(folder.roster)
    assert kept.runtime.receipts == str(folder.receipts)
    others = {"run_folder", "roster", "receipts"}
    assert kept.runtime.model_dump(exclude=others) == written.runtime.model_dump(exclude=others)


@pytest.mark.parametrize("at_end", [False, True])
def test_the_operators_word_on_evaluations_is_kept(tmp_path, at_end):
    network = {"address": "fl.example.org:8443"}
    operator = make_federation(
        tmp_path / "operator",
        plan_federation({"network": network, "evaluation": {"at-end": at_end, "checkpoints": 0}}),
    )
    given = run_config(operator.config(), operator, tmp_path / "run")
    config = make_config(tmp_path / "run").model_copy(update={"evaluation": given.evaluation})
    grid = FakeGrid(three_hospitals())
    run(config, grid)
    kinds = [message.metadata.message_type for message in grid.sent]
    assert kinds.count(messages.EVALUATE) == (3 if at_end else 0)
    assert (result_of(tmp_path / "run")["validation"] is not None) is at_end
