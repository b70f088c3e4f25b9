"""The files of a hospital in operation, and what must be right before anything is started."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from client.kept_folders import KeptFolders
from common.errors import ConfigError, FederationError
from common.hospital_config import HospitalConfig
from common.settings import load

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from common.enrolment import Enrolment

HOSPITAL_TOML = "hospital.toml"


class HospitalFolder:
    """A hospital's folder: where its configuration, keys, state and logs are."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.config_file = self.path / HOSPITAL_TOML
        self.config = load(HospitalConfig, self.config_file)
        self.state = self.path / (self.config.site.state or "state")
        self.logs = self.path / "logs"
        self.enrolment_file = self.path / self.config.connection.enrolment
        self.key_file = self.path / self.config.connection.key
        self.secrets = self.state / "secrets"
        self.secret_file = self.secrets / "superexec.bin"
        self.runtime_certificate = self.secrets / "runtime.crt"
        self.runtime_key = self.secrets / "runtime.key"
        self.key_in_use = self.secrets / "hospital.key"
        """What a running client uses, whatever renew-key does meanwhile."""
        self.ca_file = self.state / "ca.crt"
        self.flower_home = self.state / "flower"
        self.status_file = self.state / "status.json"
        self.work_file = self.state / "work.json"

    @property
    def runtime_address(self) -> str:
        """Where the SuperNode serves the worker, on loopback only."""
        return f"127.0.0.1:{self.config.connection.runtime_port}"

    @property
    def kept(self) -> KeptFolders:
        """What retention is about."""
        cache = self.path / (self.config.site.cache or "cache")
        return KeptFolders(state=self.state, cache=cache, logs=self.logs)

    def enrolment(self) -> "Enrolment":
        """What the operator gave this hospital. Raises ConfigError when it is missing or for another one."""
        from common.enrolment import Enrolment

        if not self.enrolment_file.exists():
            raise ConfigError(
                f"there is no file {self.enrolment_file}",
                why="the operator makes it: flower-server enroll NAME KEY.pub --patients N",
                fix=f"ask the operator for it and put it at {self.enrolment_file}",
            )
        enrolment = load(Enrolment, self.enrolment_file)
        hospital = self.config.hospital
        if (hospital.name, hospital.enrolled_patients) != (enrolment.hospital, enrolment.enrolled_patients):
            raise ConfigError(
                f"{HOSPITAL_TOML} says {hospital.name} with {hospital.enrolled_patients} patients, "
                f"the enrolment {enrolment.hospital} with {enrolment.enrolled_patients}",
                why="name and count must be those on the federation's roster",
                fix=f"correct [hospital] in {HOSPITAL_TOML}, or have the operator enrol you anew",
            )
        return enrolment

    def key(self, enrolment: "Enrolment") -> "ec.EllipticCurvePrivateKey":
        """The hospital's key. Raises ConfigError when others can read it or another one is enrolled."""
        from common.node_keys import load_private_key, public_key_of

        key = load_private_key(self.key_file)
        own = public_key_of(key).fingerprint
        if own != enrolment.fingerprint:
            raise ConfigError(
                f"the key {self.key_file} is not the one that is enrolled",
                why=f"its fingerprint is {own}, enrolled is {enrolment.fingerprint}",
                fix="restore the enrolled key, or send the operator the new *.pub to enrol",
            )
        return key

    def prepare(self, enrolment: "Enrolment", key: "ec.EllipticCurvePrivateKey") -> None:
        """Make the folders; write certificates, a fresh secret and the key in use. Raises FederationError."""
        from cryptography.hazmat.primitives import serialization

        from client.deployment.runtime_certificate import make_certificate

        certificate, runtime_key = make_certificate()
        own = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        try:
            for folder in (self.state, self.secrets, self.flower_home, self.logs):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _replace(self.secret_file, os.urandom(32))
            _replace(self.runtime_certificate, certificate)
            _replace(self.runtime_key, runtime_key)
            _replace(self.key_in_use, own)
            _replace(self.ca_file, enrolment.ca_certificate.encode())
            self.work_file.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(error, self.state) from error

    def tidy(self) -> None:
        """Leave no second copy of the key behind."""
        with suppress(OSError):
            self.key_in_use.unlink(missing_ok=True)

    def secret(self) -> bytes:
        """What worker and SuperNode share; ConfigError when others can read it."""
        from common.node_keys import refuse_readable_by_others

        refuse_readable_by_others(self.secret_file)
        return self.secret_file.read_bytes()


def cannot_write(error: OSError, folder: Path) -> FederationError:
    """What a person reads when the disk at `folder` takes nothing."""
    return FederationError(
        f"{error.filename or folder} cannot be written",
        why=error.strerror or str(error),
        fix=f"free space on the disk of {folder}, or make it writable for this user; then start again",
    )


def _replace(path: Path, content: bytes) -> None:
    """Write a file of its owner's only, in place of whatever was there (also a link)."""
    from common.node_keys import write_secret

    path.unlink(missing_ok=True)
    write_secret(path, content)
