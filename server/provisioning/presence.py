"""Which hospitals are connected now, asked of Flower's SuperLink on loopback."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.flower_programs import without_proxy_on_loopback
from common.health import Health, ask_health
from common.node_keys import fingerprint_of_pem
from server.provisioning.operator_config import OperatorConfig, OperatorFolder

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo

_PATIENCE = 2
SERVICES = {"server": "", "superlink": "superlink", "open path": "front", "run": "run"}
"""Services of the server's gRPC health, by the word that a person reads."""


@dataclass(frozen=True, kw_only=True)
class Presence:
    """What Flower knows of one key."""

    online: bool
    last_seen: float | None
    """Unix seconds of the last heartbeat, or of the end of its connection; None when it never came."""


def health_of(config: OperatorConfig) -> dict[str, Health]:
    """Health of the server and its parts; all unreachable when it does not run."""
    port = config.network.health_port
    whole = ask_health(port)
    if whole is Health.UNREACHABLE:
        return dict.fromkeys(SERVICES, whole)
    return {name: ask_health(port, service) if service else whole for name, service in SERVICES.items()}


def presence_by_fingerprint(folder: OperatorFolder, config: OperatorConfig) -> Mapping[str, Presence]:
    """Each key that Flower knows; empty when its SuperLink cannot be asked."""
    import httpx

    from server.deployment.control import Control

    # Never through a proxy that the environment names: this is this machine.
    os.environ.update(without_proxy_on_loopback(os.environ))
    try:
        with Control(config.network.superlink_port, authority=folder.ca_certificate.read_bytes()) as control:
            nodes = control.nodes()
    except (httpx.HTTPError, OSError):
        return {}
    known: dict[str, Presence] = {}
    for node in nodes:
        presence = _presence(node)
        fingerprint = fingerprint_of_pem(node.public_key)
        if fingerprint not in known or presence.online:
            known[fingerprint] = presence
    return known


def _presence(node: "NodeInfo") -> Presence:
    """Flower keeps until when a node counts as connected: two heartbeats' time from each heartbeat on."""
    if not node.HasField("online_until"):
        return Presence(online=False, last_seen=None)
    online = node.status == "online" and node.online_until > time.time()
    return Presence(
        online=online, last_seen=node.online_until - (_PATIENCE * node.heartbeat_interval) * online
    )
