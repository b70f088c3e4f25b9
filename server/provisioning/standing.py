"""How a federation stands now: health of the server's parts, and which hospitals are connected."""

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from common.command_line import plain_table
from common.health import Health
from server.provisioning.operator_config import OperatorFolder
from server.provisioning.presence import health_of, noted_presence, presence_by_fingerprint
from server.provisioning.roster import read_roster

if TYPE_CHECKING:
    from rich.table import Table


def standing_of(folder: OperatorFolder) -> dict[str, Any]:
    """`server`: health by part. `roster`: hospitals with `online` (None: nobody can say) and `last_seen`."""
    config = folder.config()
    health = health_of(config)
    is_up = health["superlink"] in (Health.SERVING, Health.UNKNOWN)
    noted = noted_presence(folder) if is_up else {}
    known = presence_by_fingerprint(folder, config) if noted is None else noted
    hospitals = []
    for entry in read_roster(folder.roster):
        presence = known.get(entry.fingerprint)
        hospitals.append(
            {
                "name": entry.name,
                "enrolled_patients": entry.enrolled_patients,
                "fingerprint": entry.fingerprint,
                "revoked_at": entry.revoked_at,
                "online": presence.online if presence else (False if known else None),
                "last_seen": presence.last_seen if presence else None,
            }
        )
    return {
        "federation": config.federation.name,
        "address": config.network.address,
        "server": {part: state.value for part, state in health.items()},
        "roster": hospitals,
    }


def lines_of(standing: Mapping[str, Any]) -> list[str]:
    """The head of `flower-server status` in an operator's folder."""
    parts = ", ".join(f"{part} {state}" for part, state in standing["server"].items())
    if set(standing["server"].values()) == {Health.UNREACHABLE.value}:
        parts = "not running (flower-server start)"
    return [f"federation {standing['federation']} at {standing['address']}", f"health: {parts}"]


def table_of_roster(standing: Mapping[str, Any]) -> "Table":
    """Rows of the roster."""
    words = {True: "yes", False: "no", None: "–"}
    rows = [
        (
            row["name"],
            str(row["enrolled_patients"]),
            "revoked" if row["revoked_at"] else words[row["online"]],
            _moment(row["last_seen"]),
        )
        for row in standing["roster"]
    ]
    return plain_table(("on the roster", "patients", "connected", "last seen"), rows)


def _moment(unix_seconds: float | None) -> str:
    if unix_seconds is None:
        return "–"
    return datetime.datetime.fromtimestamp(unix_seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
