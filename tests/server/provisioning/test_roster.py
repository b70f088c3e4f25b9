"""The roster: unique, strict, written whole; lost and revoked keys never come back."""

import json
import multiprocessing

import pytest

from common.errors import ConfigError
from common.node_keys import load_public_key
from server.provisioning.roster import Change, enroll, new_roster, read_roster, revoke
from tests.server.provisioning.federations import hospital_key, public_key


@pytest.fixture
def roster(tmp_path):
    new_roster(tmp_path / "roster.json")
    return tmp_path / "roster.json"


def test_hospitals_are_listed_by_name_with_their_key_and_count(roster, tmp_path):
    keys = {name: public_key(tmp_path, name) for name in ("south", "north")}
    for name, key in keys.items():
        entry, change = enroll(roster, name=name, key=key, enrolled_patients=400)
        assert change is Change.NEW
        assert entry.is_active
    entries = read_roster(roster)
    assert [entry.name for entry in entries] == ["north", "south"]
    assert [entry.fingerprint for entry in entries] == [keys["north"].fingerprint, keys["south"].fingerprint]
    assert entries[0].public_key == keys["north"].openssh


def test_one_key_is_one_hospital_and_names_do_not_differ_in_capitals_only(roster, tmp_path):
    key = public_key(tmp_path, "north")
    enroll(roster, name="north", key=key, enrolled_patients=400)
    with pytest.raises(ConfigError, match="cannot be enrolled as south") as refused:
        enroll(roster, name="south", key=key, enrolled_patients=400)
    assert "that of north" in refused.value.why
    with pytest.raises(ConfigError, match="only in capitals"):
        enroll(roster, name="North", key=public_key(tmp_path, "other"), enrolled_patients=400)
    for name in ("", "../up", "a b", "-x", "x" * 65):
        with pytest.raises(ConfigError, match="name"):
            enroll(roster, name=name, key=public_key(tmp_path, f"k{len(name)}"), enrolled_patients=400)
    with pytest.raises(ConfigError, match="enrolled-patients"):
        enroll(roster, name="none", key=public_key(tmp_path, "none"), enrolled_patients=0)
    assert len(read_roster(roster)) == 1


def test_again_with_the_same_key_changes_the_count_only(roster, tmp_path):
    key = public_key(tmp_path, "north")
    first, _ = enroll(roster, name="north", key=key, enrolled_patients=400)
    content = roster.read_bytes()
    assert enroll(roster, name="north", key=key, enrolled_patients=400) == (first, Change.NONE)
    assert roster.read_bytes() == content
    second, change = enroll(roster, name="north", key=key, enrolled_patients=500)
    assert change is Change.COUNT
    assert second == first.model_copy(update={"enrolled_patients": 500})
    assert read_roster(roster) == (second,)


def test_a_lost_key_is_replaced_when_asked_and_never_taken_again(roster, tmp_path):
    old, new = public_key(tmp_path, "old"), public_key(tmp_path, "new")
    enroll(roster, name="north", key=old, enrolled_patients=400)
    with pytest.raises(ConfigError, match="another key") as refused:
        enroll(roster, name="north", key=new, enrolled_patients=400)
    assert old.fingerprint in refused.value.why
    assert "--replace-key" in refused.value.fix
    entry, change = enroll(roster, name="north", key=new, enrolled_patients=400, replace_key=True)
    assert change is Change.KEY
    assert (entry.fingerprint, entry.replaced_fingerprints) == (new.fingerprint, (old.fingerprint,))
    for name in ("north", "thief"):
        with pytest.raises(ConfigError, match="cannot be enrolled"):
            enroll(roster, name=name, key=old, enrolled_patients=400, replace_key=True)
    assert read_roster(roster) == (entry,)


def test_a_revoked_hospital_stays_known_and_returns_with_a_new_key_only(roster, tmp_path):
    key = public_key(tmp_path, "north")
    enroll(roster, name="north", key=key, enrolled_patients=400)
    revoked = revoke(roster, "north")
    assert not revoked.is_active
    assert read_roster(roster) == (revoked,)
    with pytest.raises(ConfigError, match="was revoked"):
        revoke(roster, "north")
    with pytest.raises(ConfigError, match="is not on the roster"):
        revoke(roster, "nobody")
    for name in ("north", "south"):
        with pytest.raises(ConfigError, match="cannot be enrolled"):
            enroll(roster, name=name, key=key, enrolled_patients=400, replace_key=True)
    back, _ = enroll(
        roster, name="north", key=public_key(tmp_path, "new"), enrolled_patients=300, replace_key=True
    )
    assert back.is_active
    assert back.replaced_fingerprints == (key.fingerprint,)


def test_a_wrong_key_file_is_named_and_nothing_is_written(roster, tmp_path):
    public = hospital_key(tmp_path, "north")
    with pytest.raises(ConfigError, match="is a private key") as refused:
        load_public_key(tmp_path / "north.key")
    assert "never leave" in refused.value.why
    public.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE0 someone\n")
    with pytest.raises(ConfigError, match="not a public key of a hospital"):
        load_public_key(public)
    with pytest.raises(ConfigError, match="there is no file"):
        load_public_key(tmp_path / "nothing.pub")


def test_every_alteration_of_the_file_is_found(roster, tmp_path):
    for name in ("north", "south"):
        enroll(roster, name=name, key=public_key(tmp_path, name), enrolled_patients=400)
    whole = json.loads(roster.read_text())

    def refused(change):
        content = json.loads(json.dumps(whole))
        change(content)
        roster.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match="roster") as error:
            read_roster(roster)
        return bool(error.value.fix)

    north, south = whole["hospitals"]
    assert refused(lambda c: c["hospitals"][0].update(fingerprint=south["fingerprint"]))
    assert refused(lambda c: c["hospitals"][0].update(public_key=south["public_key"]))
    assert refused(lambda c: c["hospitals"][0].update(name="south"))
    assert refused(lambda c: c["hospitals"][0].update(name="SOUTH"))
    assert refused(lambda c: c["hospitals"].append(dict(north, name="third")))
    assert refused(lambda c: c["hospitals"][0].update(enrolled_patients="400"))
    assert refused(lambda c: c["hospitals"][0].update(enrolled_patients=-1))
    assert refused(lambda c: c["hospitals"][0].update(trusted=True))
    assert refused(lambda c: c.update(schema_version=2))
    assert refused(lambda c: c.pop("schema_version"))
    for text in ("", "{", "[]", "[" * 100_000):
        roster.write_text(text)
        with pytest.raises(ConfigError, match="roster"):
            read_roster(roster)
    roster.unlink()
    with pytest.raises(ConfigError, match="there is no roster"):
        read_roster(roster)


def _enroll_many(roster, folder, names):
    for name in names:
        enroll(roster, name=name, key=load_public_key(folder / f"{name}.key.pub"), enrolled_patients=100)


def test_two_operators_at_once_lose_nobody(roster, tmp_path):
    names = [f"h{number}" for number in range(16)]
    for name in names:
        hospital_key(tmp_path, name)
    context = multiprocessing.get_context("spawn")
    both = [
        context.Process(target=_enroll_many, args=(roster, tmp_path, part))
        for part in (names[::2], names[1::2])
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert {entry.name for entry in read_roster(roster)} == set(names)
