"""Keys: what ssh-keygen says of them, who may read them, what is refused."""

import shutil
import subprocess

import pytest

from common.errors import ConfigError
from common.node_keys import (
    fingerprint_of_pem,
    load_private_key,
    load_public_key,
    make_key,
    public_key_of,
    write_secret,
)


@pytest.fixture
def key(tmp_path):
    private, public = tmp_path / "keys" / "hospital.key", tmp_path / "keys" / "hospital.key.pub"
    return private, public, make_key(private, public, comment="hospital-a")


def test_a_new_key_is_readable_by_its_owner_only_and_halves_belong_together(key):
    private, public, fingerprint = key
    assert private.stat().st_mode & 0o777 == 0o600
    assert private.parent.stat().st_mode & 0o777 == 0o700
    read = load_public_key(public)
    assert read.fingerprint == fingerprint == public_key_of(load_private_key(private)).fingerprint
    assert read.openssh.endswith(" hospital-a")
    assert fingerprint_of_pem(read.pem) == fingerprint


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_the_fingerprint_is_the_one_of_ssh_keygen(key):
    _, public, fingerprint = key
    said = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True).stdout
    assert said.split()[1] == fingerprint
    assert said.split()[0] == "384"


def test_a_key_is_never_written_over(key):
    private, public, _ = key
    before = private.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        make_key(private, public, comment="again")
    assert private.read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_private_key_that_others_can_read_is_refused(key, mode):
    private, _, _ = key
    private.chmod(mode)
    with pytest.raises(ConfigError, match="can be read by others") as caught:
        load_private_key(private)
    assert f"{mode:04o}" in caught.value.why
    assert "chmod 600" in caught.value.fix


def test_files_that_are_no_keys_are_refused_in_words(tmp_path, key):
    private, public, _ = key
    with pytest.raises(ConfigError, match="is a private key"):
        load_public_key(private)
    other = tmp_path / "other"
    other.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJh\n")
    with pytest.raises(ConfigError, match="not a public key of a hospital"):
        load_public_key(other)
    with pytest.raises(ConfigError, match="there is no file"):
        load_public_key(tmp_path / "absent.pub")
    private.chmod(0o600)
    private.write_bytes(b"torn")
    with pytest.raises(ConfigError, match="not a private key"):
        load_private_key(private)
    assert fingerprint_of_pem(b"nonsense") == ""


def test_a_secret_can_be_renewed_only_when_asked_for(tmp_path):
    path = tmp_path / "secret.bin"
    write_secret(path, b"one")
    with pytest.raises(ConfigError):
        write_secret(path, b"two")
    path.chmod(0o644)
    write_secret(path, b"three", overwrite=True)
    assert path.read_bytes() == b"three"
    assert path.stat().st_mode & 0o777 == 0o600
