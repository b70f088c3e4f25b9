"""A new federation's folder: whole or not at all, secret where it must be, readable settings."""

import stat
import tomllib

import pytest

from common.config import FederationConfig
from common.errors import ConfigError
from common.settings import load
from server.provisioning.enrolments import enrol_hospital, is_up_to_date, revoke_hospital
from server.provisioning.new_federation import make_federation, plan_federation
from server.provisioning.operator_config import NetworkSection, OperatorConfig, OperatorFolder, split_address
from tests.server.provisioning.federations import public_key, small_federation

NETWORK = {"address": "fl.example.org:8443"}


def test_settings_read_back_equal_and_every_key_has_its_comment(tmp_path):
    config = plan_federation(
        {"federation": {"name": "chest"}, "network": NETWORK, "data": {"classes": ["a", 'b "quoted"']}},
        ["privacy.local-steps=3", "network.names=['fl.internal', '10.0.0.5']"],
    )
    folder = make_federation(tmp_path / "op", config)
    assert folder.config() == config
    assert config.privacy.local_steps == 3
    lines = folder.federation_toml.read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(keys) > 40
    assert all(lines[number - 1].startswith("# ") for number in keys)
    assert max(len(line) for line in lines) <= 110
    assert {"hospitals", "roster"}.isdisjoint(tomllib.loads(folder.federation_toml.read_text())["runtime"])


def test_a_model_with_settings_of_its_own_starts_from_them():
    network = {"address": "fl.example.org:8443"}
    asked = {"network": network, "model": {"name": "scattering"}}
    config = plan_federation(asked, ["privacy.l2-clip-norm=0.1"])
    assert (config.privacy.sampling_rate, config.privacy.l2_clip_norm) == (1.0, 0.1)
    assert (config.training.learning_rate, config.server.ema_decay) == (4.0, 0.0)
    by_override = plan_federation({"network": network}, iter(["model.name=scattering"]))
    assert by_override.federation.rounds == config.federation.rounds == 200
    assert plan_federation({"network": network}).training.learning_rate == 0.3


def test_secrets_and_folders_are_for_their_owner_only(tmp_path):
    folder = small_federation(tmp_path / "op")
    for path in folder.secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in [folder.path, *(part for part in folder.path.rglob("*") if part.is_dir())]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert len(folder.superexec_secret.read_bytes()) == 32
    other = small_federation(tmp_path / "other")
    assert other.superexec_secret.read_bytes() != folder.superexec_secret.read_bytes()


def test_nothing_is_written_over_and_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = small_federation(tmp_path / "op")
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="is not empty"):
        make_federation(folder.path, folder.config())
    assert before == {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        make_federation(tmp_path / "file", folder.config())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.provisioning.new_federation.write_bytes_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        make_federation(tmp_path / "half", folder.config())
    assert not (tmp_path / "half").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="No space left"):
        make_federation(tmp_path / "empty", folder.config())
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"name": "resnet999"}}, "resnet999"),
        ({"data": {"image-size": 16}}, "17 px"),
        ({"federation": {"name": "../x"}}, "federation.name"),
        ({"data": {"classes": ["one"]}}, "two distinct classes"),
        ({"network": {}}, "network.address"),
        ({"network": {"address": "fl.example.org"}}, "network.address"),
        ({"network": {"address": "https://fl.example.org:8443"}}, "network.address"),
        ({"network": {"address": "fl.example.org:0"}}, "names no port"),
        ({"network": NETWORK | {"listen": "0.0.0.0:8000"}}, "three ports"),
        ({"network": NETWORK | {"names": ["*.example.org"]}}, "neither a host name"),
        ({"network": NETWORK | {"hold-s": 40}}, "network.hold-s"),
        ({"network": NETWORK | {"max-body-mb": 1}}, "network.max-body-mb"),
    ],
)
def test_impossible_plans_are_refused_by_name(values, words):
    with pytest.raises(ConfigError) as refused:
        plan_federation({"federation": {"name": "chest"}, "network": NETWORK} | values)
    assert words in str(refused.value)


def test_addresses_and_names():
    assert split_address("[2001:db8::7]:8443") == ("2001:db8::7", 8443)
    network = NetworkSection(address="[2001:DB8:0::7]:8443", names=("localhost", "10.0.0.5"))
    assert network.certificate_names == ("2001:db8::7", "localhost", "127.0.0.1", "10.0.0.5")


def test_a_folder_without_federation_is_said_to_be_none(tmp_path):
    with pytest.raises(ConfigError, match="is not the folder of a federation"):
        OperatorFolder(tmp_path).config()


def test_a_plain_federation_file_lacks_the_network(tmp_path):
    (tmp_path / "federation.toml").write_text("[federation]\nname = 'x'\n")
    with pytest.raises(ConfigError, match="network"):
        load(OperatorConfig, tmp_path / "federation.toml")
    assert load(FederationConfig, tmp_path / "federation.toml").federation.name == "x"


def test_the_current_run_moves_with_the_folder(tmp_path):
    folder = small_federation(tmp_path / "op")
    assert folder.run_folder() is None
    folder.remember_run(folder.runs / "one")
    folder.path.rename(tmp_path / "moved")
    assert OperatorFolder(tmp_path / "moved").run_folder() == tmp_path / "moved" / "runs" / "one"
    OperatorFolder(tmp_path / "moved").remember_run(tmp_path / "elsewhere")
    assert OperatorFolder(tmp_path / "moved").run_folder() == tmp_path / "elsewhere"


def test_an_enrolment_file_follows_settings_and_roster(tmp_path):
    folder = small_federation(tmp_path / "op")
    key = public_key(tmp_path, "north")
    entry, _, path = enrol_hospital(folder, name="north", key=key, enrolled_patients=400)
    assert is_up_to_date(folder, folder.config(), entry)
    text = path.read_text()
    assert "PRIVATE" not in text
    assert str(folder.path) not in text
    folder.federation_toml.write_text(folder.federation_toml.read_text().replace(":8443", ":9443"))
    assert not is_up_to_date(folder, folder.config(), entry)
    enrol_hospital(folder, name="north", key=key, enrolled_patients=400)
    assert is_up_to_date(folder, folder.config(), entry)
    revoke_hospital(folder, "north")
    assert not path.exists()
