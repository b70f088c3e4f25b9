"""How a hospital's client is: its own words (state/status.json), gRPC health, pause, ledger of code."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from client.deployment.hospital_folder import HospitalFolder
from client.provisioning.standing import LEFT, PAUSED, since
from common.errors import printable
from common.health import Health, ask_health

_SERVICES = ("", "connection", "worker")
_SAID_ELSEWHERE = frozenset({"schema", "hospital", "standing"})
WORKS, NOT_RUNNING, SERVER_AWAY = 0, 1, 3
"""Exit codes of `flower-client status`; 2 is for settings."""


@dataclass(frozen=True, kw_only=True)
class HospitalStatus:
    """What is known of a hospital's client from outside."""

    name: str
    health: Mapping[str, Health]
    """By service; "" is the whole client."""
    paused_since: str
    """UTC ISO 8601; empty when it takes part."""
    left_since: str
    told: Mapping[str, Any]
    """What the client has written of itself; old where it does not run."""

    @property
    def is_running(self) -> bool:
        """Whether a client answers."""
        return self.health[""] is not Health.UNREACHABLE

    @property
    def is_serving(self) -> bool:
        """Whether it runs, is connected, and its worker lives."""
        return self.health[""] is Health.SERVING

    @property
    def waits_for_server(self) -> bool:
        """Whether the client itself is well, and not connected."""
        well = self.is_running and self.health["worker"] is Health.SERVING
        return well and self.health["connection"] is not Health.SERVING

    @property
    def exit_code(self) -> int:
        """Of the command: 0 works, 1 no client runs or its worker does not, 3 runs without its server."""
        if self.is_serving:
            return WORKS
        return SERVER_AWAY if self.waits_for_server else NOT_RUNNING

    @property
    def in_words(self) -> str:
        """One line: does it run, is it connected."""
        if not self.is_running:
            return "not running"
        if self.waits_for_server:
            last = _clock(self.told.get("last_connected"))
            return f"runs, waits for the server ({f'last connected {last}' if last else 'not connected yet'})"
        return "runs, connected" if self.is_serving else "runs, its worker is not ready"

    def rows(self) -> Iterator[tuple[str, str]]:
        """Lines for a person."""
        yield "hospital", self.name
        yield "client", self.in_words
        if self.is_running:
            for service in _SERVICES[1:]:
                yield service, self.health[service].value
        if self.paused_since:
            yield "paused since", self.paused_since
        if self.left_since:
            yield "left since", self.left_since
        then = "" if self.is_running else "then: "
        for key, value in _flat(self.told):
            if key not in _SAID_ELSEWHERE and value not in (None, "", []):
                yield then + printable(key.replace("_", " ")), _lines(value)

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "name": self.name,
            "running": self.is_running,
            "serving": self.is_serving,
            "waits_for_server": self.waits_for_server,
            "health": {service or "all": health.value for service, health in self.health.items()},
            "paused_since": self.paused_since,
            "left_since": self.left_since,
            "status": dict(self.told),
        }


def hospital_status(folder: Path) -> HospitalStatus:
    """Look at the hospital in `folder`; raises ConfigError without a usable hospital.toml."""
    hospital = HospitalFolder(folder)
    port = hospital.config.connection.health_port
    whole = ask_health(port)
    parts = {} if whole is Health.UNREACHABLE else {name: ask_health(port, name) for name in _SERVICES[1:]}
    return HospitalStatus(
        name=hospital.config.hospital.name,
        health={"": whole, **parts},
        paused_since=since(hospital.state, PAUSED),
        left_since=since(hospital.state, LEFT),
        told=_told(hospital.status_file),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield prefix + key, value


def _lines(value: object) -> str:
    """The client's own words; a fault has three lines."""
    return "\n".join(printable(line) for line in str(value).split("\n")[:3])


def _clock(moment: object) -> str:
    """HH:MM here, with the date where it is another day; empty where there is no time."""
    try:
        local = datetime.fromisoformat(str(moment)).astimezone()
    except (ValueError, OverflowError, OSError):
        return ""
    is_today = local.strftime("%Y-%m-%d") == time.strftime("%Y-%m-%d")
    return local.strftime("%H:%M" if is_today else "%Y-%m-%d %H:%M")


def _told(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
