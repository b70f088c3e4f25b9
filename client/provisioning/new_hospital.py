"""A hospital's folder: its key, its configuration with comments, its list of accepted code."""

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

from client.deployment.hospital_folder import HOSPITAL_TOML
from client.provisioning.code_list import accept
from common.bundle.bundle import bundle_sha256
from common.commented_toml import to_commented_toml
from common.errors import ConfigError
from common.files import write_bytes_atomically
from common.hospital_config import HospitalConfig
from common.messages import SCHEMA_VERSION
from common.node_keys import load_private_key, make_key, public_key_of
from common.settings import load

_HEAD = """A hospital of a federation: who it is, its images, its privacy policy, its machine.
Nothing in this file leaves the hospital but its name and the enrolled count.
After a change: flower-client check, then restart flower-client."""


@dataclass(frozen=True, kw_only=True)
class NewHospital:
    """What `init` or `renew-key` has made, and what the operator needs of it."""

    name: str
    enrolled_patients: int
    fingerprint: str
    config_file: Path
    public_key: Path

    def enroll_command(self, *, replace_key: bool = False) -> str:
        """What the operator types, beside the public key file."""
        command = f"flower-server enroll {self.name} {self.public_key.name}"
        command += f" --patients {self.enrolled_patients}"
        return f"{command} --replace-key" if replace_key else command


def make_hospital(folder: Path, config: HospitalConfig) -> NewHospital:
    """Fill `folder` (mode 0700); a key that an interrupted attempt has left is taken.

    Raises ConfigError when there is a hospital.toml already.
    """
    config_file = folder / HOSPITAL_TOML
    if config_file.exists():
        raise ConfigError(
            f"{config_file} exists already",
            why="a hospital's settings and key are never written over",
            fix="edit that file, choose another folder, or make a new key with flower-client renew-key",
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    private = folder / config.connection.key
    public = _public_of(private)
    if private.exists():
        fingerprint = _write_public(private, public, config.hospital.name)
    else:
        fingerprint = make_key(private, public, comment=config.hospital.name)
    state = folder / (config.site.state or "state")
    for needed in (state, folder / "logs"):
        needed.mkdir(parents=True, exist_ok=True, mode=0o700)
    release = importlib.metadata.version("hospital-federation")
    accept(state, bundle_sha256(), note=f"release {release}, wire schema {SCHEMA_VERSION}, as installed")
    # Last: a folder with this file is a whole one.
    write_bytes_atomically(config_file, to_commented_toml(config, head=_HEAD).encode(), mode=0o600)
    return _made(config, config_file, public, fingerprint)


def renew_key(folder: Path) -> tuple[NewHospital, Path | None]:
    """Make a new key and keep the old one beside it; gives the old one's new place, None where it was lost.

    The hospital cannot connect until the operator has replaced the key on the roster.
    """
    config_file = folder / HOSPITAL_TOML
    config = load(HospitalConfig, config_file)
    private = folder / config.connection.key
    public, new = _public_of(private), private.with_name(private.name + ".new")
    for left_over in (new, _public_of(new)):
        left_over.unlink(missing_ok=True)
    fingerprint = make_key(new, _public_of(new), comment=config.hospital.name)
    old = _free_name(private) if private.exists() else None
    if old is not None:
        os.replace(private, old)
    os.replace(new, private)
    if old is not None and public.exists():
        os.replace(public, _public_of(old))
    os.replace(_public_of(new), public)
    return _made(config, config_file, public, fingerprint), old


def _made(config: HospitalConfig, config_file: Path, public: Path, fingerprint: str) -> NewHospital:
    return NewHospital(
        name=config.hospital.name,
        enrolled_patients=config.hospital.enrolled_patients,
        fingerprint=fingerprint,
        config_file=config_file,
        public_key=public,
    )


def _public_of(private: Path) -> Path:
    return private.with_name(private.name + ".pub")


def _write_public(private: Path, public: Path, comment: str) -> str:
    key = public_key_of(load_private_key(private))
    public.write_text(f"{key.openssh} {comment}\n")
    return key.fingerprint


def _free_name(private: Path) -> Path:
    names = [private.name + ".old", *(f"{private.name}.old.{number}" for number in range(1, 1000))]
    return next(path for path in map(private.with_name, names) if not path.exists())
