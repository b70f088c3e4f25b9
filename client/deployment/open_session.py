"""The session that is open at the server: written down, so that one nobody could end is ended afterwards.

Flower keeps the session of a SuperNode that was killed for 60 s and lets nobody else in meanwhile. Ending it
needs its node id and the hospital's key. Only a session of this very folder on this very machine is ended:
a copy of the folder must not throw out the original.
"""

import json
import time
from contextlib import suppress
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.deployment.fleet_client import GuardedFleetClient
from common.enrolment import Enrolment

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class OpenSession:
    """The file that names it; absent while no session of ours is open."""

    def __init__(self, path: Path, enrolment: Enrolment) -> None:
        self._path = path
        self._is_closed = False
        self._place = {
            "folder": str(path.parent),
            "boot": _boot_id(),
            "address": enrolment.address,
            "fingerprint": enrolment.fingerprint,
        }

    def opened(self, node_id: int) -> None:
        """Note that a session was opened for this node."""
        self._is_closed = False
        with suppress(OSError):  # without the file it takes 60 s longer after a crash
            self._path.write_text(json.dumps({**self._place, "node": str(node_id), "since": time.time()}))
            self._path.chmod(0o600)

    def closed(self) -> None:
        """Note that it was ended."""
        self._is_closed = True  # also where the disk keeps the file
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def left_open(self) -> int | None:
        """Node id of a session of this folder that nobody has ended; None without one."""
        if self._is_closed:
            return None
        try:
            content = json.loads(self._path.read_text())
            ours = all(content[key] == value for key, value in self._place.items())
            return int(content["node"]) if ours else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def end_session(enrolment: Enrolment, key: ec.EllipticCurvePrivateKey, node_id: int) -> None:
    """End it at the server; whatever goes wrong, it expires by itself."""
    client = GuardedFleetClient.from_server_address(
        enrolment.address,
        False,
        enrolment.ca_certificate.encode(),
        interceptors=[
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    )
    with client, suppress(httpx.HTTPError, ValueError):
        client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
