"""The roster: which hospitals take part, by name and key; nobody else is ever asked.

One file, `roster.json`, changed under a lock and replaced as a whole. A name, once given, stays the same
hospital's; a key that was replaced or revoked is never taken again.
"""

import datetime
import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from common.errors import ConfigError
from common.files import write_json_atomically
from common.names import FINGERPRINT, NAME
from common.node_keys import PublicKey, parse_public_key
from common.settings import Section, parse

SCHEMA = 1
_RESTORE = "restore roster.json from your backup (flower-server restore), or correct that entry"


class RosterEntry(Section):
    """One hospital; everything here is public."""

    name: str = Field(pattern=NAME)
    """Name: letters, digits, dot, dash, underscore."""
    fingerprint: str = Field(pattern=FINGERPRINT)
    """Fingerprint of its key, as `ssh-keygen -l` prints it."""
    public_key: str
    """Its key, one line in OpenSSH form."""
    enrolled_patients: int = Field(ge=1, le=10**9, strict=True)
    """The rounded public count of its patients."""
    enrolled_at: str
    """When it came onto the roster, ISO 8601 in UTC."""
    revoked_at: str | None = None
    """When it was taken off; None as long as it takes part."""
    replaced_fingerprints: tuple[str, ...] = ()
    """Keys that it had before; they are never taken again."""

    @property
    def is_active(self) -> bool:
        """Whether it takes part."""
        return self.revoked_at is None

    @model_validator(mode="after")
    def _fingerprint_is_the_keys(self) -> Self:
        try:
            own = parse_public_key(self.public_key, source=self.name).fingerprint
        except ConfigError as error:
            raise ValueError(error.what) from None
        if own != self.fingerprint:
            raise ValueError(f"the fingerprint of {self.name} is not that of its key ({own})")
        return self


class _RosterFile(Section):
    """What stands in roster.json."""

    schema_version: int = Field(ge=SCHEMA, le=SCHEMA, strict=True)
    hospitals: tuple[RosterEntry, ...] = ()

    @model_validator(mode="after")
    def _names_and_keys_are_unique(self) -> Self:
        names = [entry.name.casefold() for entry in self.hospitals]
        keys = [key for entry in self.hospitals for key in _keys_of(entry)]
        if len(set(names)) < len(names) or len(set(keys)) < len(keys):
            raise ValueError("a name or a key stands there twice")
        return self


class Change(StrEnum):
    """What an enrolment did to the roster."""

    NEW = "enrolled"
    KEY = "key replaced"
    COUNT = "patient count changed"
    NONE = "already enrolled"


def read_roster(path: Path) -> tuple[RosterEntry, ...]:
    """Every hospital in name order, revoked ones included. Raises ConfigError for a broken file."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no roster {path}", fix=_RESTORE) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON", why=str(error), fix=_RESTORE) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a roster", why="expected one JSON object", fix=_RESTORE)
    try:
        return parse(_RosterFile, values, source=str(path)).hospitals
    except ConfigError as error:
        raise ConfigError(error.what, why=error.why, fix=_RESTORE) from None


def new_roster(path: Path) -> None:
    """Write a roster without hospitals."""
    _write(path, ())


def enroll(
    path: Path, *, name: str, key: PublicKey, enrolled_patients: int, replace_key: bool = False
) -> tuple[RosterEntry, Change]:
    """Put a hospital on the roster, or change its count, or (`replace_key`) its key. Raises ConfigError.

    A replaced key counts as lost: it is never taken again. A revoked hospital comes back with a new key only.
    """
    with _locked(path):
        entries = read_roster(path)
        known = next((entry for entry in entries if entry.name.casefold() == name.casefold()), None)
        _refuse_taken_key(entries, name, key)
        if known is None:
            entry, change = _new_entry(name, key, enrolled_patients), Change.NEW
        elif known.name != name:
            raise ConfigError(
                f"the name {name} differs from {known.name} only in capitals",
                why="a person, or a file system, could mix them up",
                fix=f"use {known.name} for that hospital, or another name for a new one",
            )
        else:
            entry, change = _changed(known, key, enrolled_patients, replace_key=replace_key)
        if entry != known:
            _write(path, [*(other for other in entries if other.name != name), entry])
        return entry, change


def revoke(path: Path, name: str) -> RosterEntry:
    """Take a hospital off; its entry stays, so that its key is recognised. Raises ConfigError."""
    with _locked(path):
        entries = read_roster(path)
        known = next((entry for entry in entries if entry.name == name), None)
        if known is None:
            names = ", ".join(entry.name for entry in entries) or "none"
            raise ConfigError(
                f"{name} is not on the roster", why=f"hospitals there: {names}", fix=_SEE_ROSTER
            )
        if not known.is_active:
            raise ConfigError(f"{name} was revoked at {known.revoked_at}", fix=_SEE_ROSTER)
        entry = known.model_copy(update={"revoked_at": _now()})
        _write(path, [*(other for other in entries if other.name != name), entry])
        return entry


_SEE_ROSTER = "see the roster: flower-server roster"


def _changed(
    known: RosterEntry, key: PublicKey, enrolled_patients: int, *, replace_key: bool
) -> tuple[RosterEntry, Change]:
    if key.fingerprint == known.fingerprint:
        values = known.model_dump() | {"enrolled_patients": enrolled_patients}
        changed = parse(RosterEntry, values, source="enroll")
        return changed, Change.NONE if changed == known else Change.COUNT
    if not replace_key:
        raise ConfigError(
            f"{known.name} is on the roster with another key",
            why=f"enrolled {known.fingerprint}, given {key.fingerprint}",
            fix="ask the hospital by telephone which is right; then add --replace-key for the given one",
        )
    retired = (*known.replaced_fingerprints, known.fingerprint)
    entry = _new_entry(known.name, key, enrolled_patients)
    return entry.model_copy(update={"replaced_fingerprints": retired}), Change.KEY


def _refuse_taken_key(entries: Sequence[RosterEntry], name: str, key: PublicKey) -> None:
    for entry in entries:
        mine = entry.name == name and entry.is_active and entry.fingerprint == key.fingerprint
        if mine or key.fingerprint not in _keys_of(entry):
            continue
        if key.fingerprint != entry.fingerprint:
            why = f"{entry.name} had it before and replaced it: it may be in other hands"
        elif not entry.is_active:
            why = f"it is that of {entry.name}, revoked at {entry.revoked_at}"
        else:
            why = f"it is that of {entry.name}: one key is one hospital"
        raise ConfigError(
            f"the key {key.fingerprint} cannot be enrolled as {name}",
            why=why,
            fix="have the hospital make a new key (flower-client renew-key), then enroll with --replace-key",
        )


def _new_entry(name: str, key: PublicKey, enrolled_patients: int) -> RosterEntry:
    values = {
        "name": name,
        "fingerprint": key.fingerprint,
        "public_key": key.openssh,
        "enrolled_patients": enrolled_patients,
        "enrolled_at": _now(),
    }
    return parse(RosterEntry, values, source="enroll")


def _keys_of(entry: RosterEntry) -> tuple[str, ...]:
    return (entry.fingerprint, *entry.replaced_fingerprints)


def _write(path: Path, entries: Sequence[RosterEntry]) -> None:
    in_order = sorted(entries, key=lambda entry: entry.name)
    hospitals = [entry.model_dump(mode="json") for entry in in_order]
    write_json_atomically(path, {"schema_version": SCHEMA, "hospitals": hospitals})


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two commands at once must not lose one another's hospital; released when the process ends, however."""
    if not path.parent.is_dir():
        raise ConfigError(f"there is no roster {path}", fix=_RESTORE)
    with path.with_name(".roster.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
