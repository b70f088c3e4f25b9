"""How a hospital's client is: its own words (state/status.json), gRPC health, pause, ledger of code."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.deployment.hospital_folder import HospitalFolder
from client.provisioning.standing import LEFT, PAUSED, since
from common.health import Health, ask_health

_SERVICES = ("", "connection", "worker")
_SAID_ELSEWHERE = frozenset({"schema", "hospital", "standing"})


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

    def rows(self) -> Iterator[tuple[str, str]]:
        """Lines for a person."""
        yield "hospital", self.name
        yield "client", self.health[""].value if self.is_running else "not running"
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
                yield then + key.replace("_", " "), str(value)

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "name": self.name,
            "running": self.is_running,
            "serving": self.is_serving,
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


def _told(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
