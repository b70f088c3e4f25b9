import pytest

from common.config import FederationConfig
from common.errors import ConfigError
from common.hospital_config import PolicyConfig
from common.settings import load, to_toml
from simulations.scenario import DEFAULT_EPSILON, DataFacts, Scenario, make_scenario, settle

FACTS = DataFacts(
    name="films",
    classes=("normal", "opacity"),
    unit="patient",
    image_size=28,
    channels=1,
    units_per_hospital=300,
)


def test_without_flags_everything_has_a_default() -> None:
    scenario = make_scenario({})
    assert scenario.generates_images
    assert scenario.partition_spec.column == "site"
    config = settle(scenario, FACTS)
    assert isinstance(config, FederationConfig)
    assert config.federation.private
    assert not config.federation.reproducible
    assert config.data.classes == ("normal", "opacity")
    assert (config.data.image_size, config.data.channels) == (28, 1)


def test_the_default_budget_is_that_of_a_hospitals_policy() -> None:
    assert PolicyConfig.model_fields["epsilon"].default == DEFAULT_EPSILON


def test_with_data_the_default_partition_is_iid() -> None:
    assert make_scenario({"data": "x.npz"}).partition_spec.kind == "iid"


def test_flags_beat_recommendations_and_set_beats_flags() -> None:
    advised = settle(make_scenario({}), FACTS)
    flagged = settle(make_scenario({"rounds": 3, "local_steps": 7, "model": "cnn1"}), FACTS)
    assert (flagged.federation.rounds, flagged.privacy.local_steps, flagged.model.name) == (3, 7, "cnn1")
    assert flagged.privacy.sampling_rate == advised.privacy.sampling_rate
    overridden = settle(
        make_scenario({"rounds": 3, "set": ("federation.rounds=4", "training.learning-rate=0.25")}), FACTS
    )
    assert (overridden.federation.rounds, overridden.training.learning_rate) == (4, 0.25)


@pytest.mark.parametrize(("epsilon", "rounds"), [(1.0, 100), (3.0, 200), (8.0, 300)])
def test_scattering_brings_its_own_settings(epsilon, rounds) -> None:
    config = settle(make_scenario({"model": "scattering", "epsilon": epsilon}), FACTS)
    assert config.federation.rounds == rounds
    assert (config.privacy.sampling_rate, config.privacy.l2_clip_norm) == (1.0, 0.2)
    assert (config.training.learning_rate, config.privacy.local_steps) == (4.0, 1)
    assert (config.server.optimizer, config.server.momentum, config.server.final_model) == (
        "momentum",
        0.9,
        "last",
    )
    own = settle(make_scenario({"model": "scattering", "set": ("privacy.sampling-rate=0.25",)}), FACTS)
    assert own.privacy.sampling_rate == 0.25


def test_private_false_must_be_asked_for_and_reaches_the_plan() -> None:
    assert not settle(make_scenario({"private": "false"}), FACTS).federation.private
    assert settle(make_scenario({"private": "true"}), FACTS).federation.private


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"engine": "spark"}, "--engine"),
        ({"private": "perhaps"}, "--private"),
        ({"private": "false", "epsilon": 3.0}, "epsilon"),
        ({"epsilon": 0.0}, "--epsilon"),
        ({"delta": 1.5}, "--delta"),
        ({"model": "alexnet"}, "cnn-small"),
        ({"partition": "half"}, "dirichlet:ALPHA"),
        ({"channels": "2"}, "--channels"),
        ({"image_size": 4}, "--image-size"),
        ({"device": "tpu"}, "--device"),
        ({"set": ("rounds",)}, "key=value"),
    ],
)
def test_impossible_flags_are_refused_by_name(flags: dict, words: str) -> None:
    with pytest.raises(ConfigError) as failure:
        make_scenario(flags)
    assert words in str(failure.value)


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="learning-rat"):
        settle(make_scenario({"set": ("training.learning-rat=1",)}), FACTS)


def test_a_scenario_survives_its_file(tmp_path) -> None:
    scenario = make_scenario(
        {"data": "x.npz", "epsilon": 3.0, "hospitals": 4, "set": ("server.quorum=2",), "reproducible": True}
    )
    (tmp_path / "scenario.toml").write_text(to_toml(scenario))
    assert load(Scenario, tmp_path / "scenario.toml") == scenario
