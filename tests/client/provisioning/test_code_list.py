"""The list of accepted bundles and the hospital's standing: small files that decide whether it trains."""

import stat

import pytest

from client.provisioning import standing
from client.provisioning.code_list import accept, accepted, is_accepted, withdraw
from common.errors import ConfigError

ONE, TWO = "1" * 64, "ab" * 32


def test_nothing_is_accepted_until_somebody_did(tmp_path):
    assert accepted(tmp_path) == ()
    assert not is_accepted(tmp_path, ONE)
    assert accept(tmp_path, ONE, note="by telephone")
    assert not accept(tmp_path, f" SHA256:{ONE}\n")  # the same again
    assert accept(tmp_path, TWO.upper())
    assert is_accepted(tmp_path, ONE)
    assert is_accepted(tmp_path, TWO)
    assert not is_accepted(tmp_path, "1" * 63 + "2")
    assert not is_accepted(tmp_path, "")
    assert [code.note for code in accepted(tmp_path)] == ["by telephone", ""]
    assert stat.S_IMODE((tmp_path / "accepted-code.json").stat().st_mode) == 0o600


def test_what_was_accepted_can_be_withdrawn(tmp_path):
    accept(tmp_path, ONE)
    accept(tmp_path, TWO)
    withdraw(tmp_path, "abab")
    assert [code.sha256 for code in accepted(tmp_path)] == [ONE]
    for nothing in ("abab", "", "2"):
        with pytest.raises(ConfigError, match="names 0"):
            withdraw(tmp_path, nothing)


@pytest.mark.parametrize("wrong", ["", "123", "g" * 64, "1" * 65, "../../x"])
def test_only_digests_are_accepted(tmp_path, wrong):
    with pytest.raises(ConfigError, match="not the digest of a bundle"):
        accept(tmp_path, wrong)


@pytest.mark.parametrize("content", ["", "[]", '{"accepted": [{"sha256": 1}]}', '{"accepted": [1]}', "{}"])
def test_a_damaged_list_accepts_nothing(tmp_path, content):
    (tmp_path / "accepted-code.json").write_text(content)
    with pytest.raises(ConfigError, match="cannot be read as the list"):
        is_accepted(tmp_path, ONE)


def test_a_list_with_another_digest_form_is_damaged(tmp_path):
    (tmp_path / "accepted-code.json").write_text('{"accepted": [{"sha256": "*", "accepted_at": ""}]}')
    with pytest.raises(ConfigError, match="SHA-256"):
        is_accepted(tmp_path, "*")


def test_pause_and_leave_are_undone_separately(tmp_path):
    state = tmp_path / "state"
    assert not standing.is_paused(state)
    assert not standing.has_left(state)
    assert standing.pause(state)
    begun = standing.since(state, standing.PAUSED)
    assert not standing.pause(state)
    assert standing.since(state, standing.PAUSED) == begun != ""
    assert standing.leave(state)
    assert standing.is_paused(state)
    assert standing.has_left(state)
    assert standing.unpause(state)
    assert not standing.unpause(state)
    assert standing.has_left(state)
    assert standing.come_back(state)
    assert standing.since(state, standing.LEFT) == ""
