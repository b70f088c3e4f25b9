"""The digests of the bundles that this hospital accepts: its own list, nobody else adds to it.

A bundle holds no code (see `common.bundle`); its digest stands for a release and its wire schema.
"""

import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.errors import ConfigError
from common.files import write_json_atomically

FILE = "accepted-code.json"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class AcceptedCode:
    """One bundle that may arrive."""

    sha256: str
    """Of the whole bundle, 64 hexadecimal digits."""
    accepted_at: str
    """UTC, ISO 8601."""
    note: str = ""
    """Why, in the words of who accepted it."""


def accepted(state: Path) -> tuple[AcceptedCode, ...]:
    """The list in the hospital's state folder, oldest first; raises ConfigError when it is damaged."""
    path = state / FILE
    try:
        entries = json.loads(path.read_text())["accepted"]
        codes = tuple(AcceptedCode(**entry) for entry in entries)
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from None
    if not all(isinstance(code.sha256, str) and _DIGEST.fullmatch(code.sha256) for code in codes):
        raise _damaged(path, "an entry is not a SHA-256")
    return codes


def is_accepted(state: Path, digest: str) -> bool:
    """Whether this bundle is on the list; an empty or missing list accepts nothing."""
    return any(code.sha256 == digest for code in accepted(state))


def accept(state: Path, digest: str, *, note: str = "") -> bool:
    """Put a digest on the list; False when it was there. Raises ConfigError when it is no SHA-256."""
    digest = digest.strip().lower().removeprefix("sha256:")
    if not _DIGEST.fullmatch(digest):
        raise ConfigError(
            f"{digest!r} is not the digest of a bundle",
            why="expected 64 hexadecimal digits, the SHA-256 of the bundle",
            fix="flower-client check shows the digest that the server submits; compare it with the operator",
        )
    known = accepted(state)
    if any(code.sha256 == digest for code in known):
        return False
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entries = [*known, AcceptedCode(sha256=digest, accepted_at=now, note=note)]
    write_json_atomically(state / FILE, {"accepted": [asdict(code) for code in entries]}, mode=0o600)
    return True


def withdraw(state: Path, digest: str) -> None:
    """Take a digest off the list; raises ConfigError when it is not there."""
    known = accepted(state)
    matching = [code for code in known if digest and code.sha256.startswith(digest.strip().lower())]
    if len(matching) != 1:
        raise ConfigError(
            f"{digest!r} names {len(matching)} of the accepted bundles",
            fix="flower-client code list shows them; give enough digits of one",
        )
    entries = [asdict(code) for code in known if code not in matching]
    write_json_atomically(state / FILE, {"accepted": entries}, mode=0o600)


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read as the list of accepted bundles",
        why=why,
        fix="delete it and accept the release again: flower-client code accept DIGEST",
    )
