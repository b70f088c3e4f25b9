"""Which hospitals are connected now, as the running server has just noted or Flower's SuperLink says."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.flower_programs import without_proxy_on_loopback
from common.health import Health, ask_health
from common.machine import is_locked
from common.node_keys import fingerprint_of_pem
from server.provisioning.operator_config import OperatorConfig, OperatorFolder

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo

_PATIENCE = 2
_FRESH_S = 15.0
"""A running server notes it every 5 s."""
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
    return presence_of(nodes)


def noted_presence(folder: OperatorFolder) -> Mapping[str, Presence] | None:
    """The same as the running server has noted it in state/server.json, 15 s old at most; None without one.

    Asking Flower itself takes a second: its package imports most of itself.
    """
    if not is_locked(folder.lock):
        return None
    try:
        noted = json.loads(folder.server_json.read_text())
        if noted["state"] != "running" or not 0 <= time.time() - noted["updated"] <= _FRESH_S:
            return None
        return {key: Presence(**known) for key, known in noted["presence"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def presence_of(nodes: Iterable["NodeInfo"]) -> dict[str, Presence]:
    """What Flower's list of nodes says of each key, by fingerprint."""
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
