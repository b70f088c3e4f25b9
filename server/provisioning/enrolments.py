"""What goes to a hospital: `enrolments/NAME.toml`, made from roster, certificates and settings."""

import importlib.metadata
import os
import time
from pathlib import Path

from common.bundle.bundle import bundle_sha256
from common.enrolment import Enrolment
from common.errors import ConfigError
from common.files import write_bytes_atomically
from common.machine import is_locked
from common.messages import SCHEMA_VERSION
from common.node_keys import PublicKey
from common.settings import load, to_toml
from server.provisioning.certificates import load_certificate, make_authority
from server.provisioning.new_federation import renew_server_certificate
from server.provisioning.operator_config import OperatorConfig, OperatorFolder
from server.provisioning.roster import Change, RosterEntry, enroll, read_roster, revoke

_HEAD = """# Enrolment of {hospital} in the federation {federation}, from its operator. It holds no secret.
# The hospital keeps it as enrolment.toml beside its hospital.toml.
"""


def enrol_hospital(
    folder: OperatorFolder, *, name: str, key: PublicKey, enrolled_patients: int, replace_key: bool = False
) -> tuple[RosterEntry, Change, Path]:
    """Put a hospital on the roster (see `roster.enroll`) and write its file. Raises ConfigError."""
    config = folder.config()
    entry, change = enroll(
        folder.roster, name=name, key=key, enrolled_patients=enrolled_patients, replace_key=replace_key
    )
    return entry, change, write_enrolment(folder, config, entry)


def revoke_hospital(folder: OperatorFolder, name: str) -> RosterEntry:
    """Take a hospital off the roster and its file away. Raises ConfigError."""
    entry = revoke(folder.roster, name)
    enrolment_file(folder, name).unlink(missing_ok=True)
    return entry


def enrolment_of(folder: OperatorFolder, config: OperatorConfig, entry: RosterEntry) -> Enrolment:
    """What the hospital has to know today. Raises ConfigError without the authority's certificate."""
    load_certificate(folder.ca_certificate)
    return Enrolment(
        federation=config.federation.name,
        hospital=entry.name,
        enrolled_patients=entry.enrolled_patients,
        fingerprint=entry.fingerprint,
        address=config.network.address,
        release=importlib.metadata.version("hospital-federation"),
        wire_schema=SCHEMA_VERSION,
        bundle_sha256=bundle_sha256(),
        ca_certificate=folder.ca_certificate.read_text(),
        plan=config.public_plan,
    )


def write_enrolment(folder: OperatorFolder, config: OperatorConfig, entry: RosterEntry) -> Path:
    """Write or replace the file for one hospital and give its path."""
    enrolment = enrolment_of(folder, config, entry)
    head = _HEAD.format(hospital=enrolment.hospital, federation=enrolment.federation)
    path = enrolment_file(folder, entry.name)
    write_bytes_atomically(path, (head + to_toml(enrolment)).encode())
    return path


def is_up_to_date(folder: OperatorFolder, config: OperatorConfig, entry: RosterEntry) -> bool:
    """Whether the hospital's file says what would be written now."""
    try:
        return load(Enrolment, enrolment_file(folder, entry.name)) == enrolment_of(folder, config, entry)
    except ConfigError:
        return False


def renew_authority(folder: OperatorFolder) -> list[Path]:
    """Make a new authority and server certificate and write every hospital's file anew; gives those files.

    The old authority is kept beside the new one as `.old-TIME`. Until a hospital has its new file it refuses
    this server. Raises ConfigError, also while a server runs: its parts would not trust one another any more.
    """
    config = folder.config()
    if is_locked(folder.lock):
        raise ConfigError(
            f"the server of {folder.path} is running",
            why="its parts, and every hospital that is connected, trust the authority that it has now",
            fix="end it first (flower-server stop, or systemctl stop flower-server), then renew",
        )
    new_key, new_certificate = (p.with_name(p.name + ".new") for p in (folder.ca_key, folder.ca_certificate))
    for left_over in (new_key, new_certificate):
        left_over.unlink(missing_ok=True)
    make_authority(new_key, new_certificate, federation=config.federation.name)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for old, new in ((folder.ca_key, new_key), (folder.ca_certificate, new_certificate)):
        if old.exists():  # one that is lost is a reason for this command
            os.replace(old, old.with_name(f"{old.name}.old-{stamp}"))
        os.replace(new, old)
    renew_server_certificate(folder)
    return [write_enrolment(folder, config, entry) for entry in read_roster(folder.roster) if entry.is_active]


def enrolment_file(folder: OperatorFolder, hospital: str) -> Path:
    """Where the file for a hospital lies."""
    return folder.enrolments / f"{hospital}.toml"
