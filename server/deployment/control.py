"""What the operator's side asks of the SuperLink over its Control API, on loopback only."""

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.control import ControlHttpClient

from common.bundle.bundle import bundle_bytes
from common.errors import ConfigError, FederationError
from common.node_keys import fingerprint_of_pem, parse_public_key
from server.provisioning.roster import RosterEntry

_ONLINE, _UNREGISTERED, _FINISHED = "online", "unregistered", "finished"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Enforced:
    """What enforcing the roster came to, in words."""

    done: list[str]
    failed: list[str]
    """Found again at each attempt."""


class Control:
    """A connection to the Control API; as a context manager it closes itself."""

    def __init__(self, port: int, *, authority: bytes) -> None:
        self._client = ControlHttpClient.from_server_address(
            f"127.0.0.1:{port}", False, authority, interceptors=[]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def enforce(self, roster: Sequence[RosterEntry]) -> "Enforced":
        """Register who is on the roster, unregister whoever is not; what was done, and what cannot be.

        What fails for one hospital keeps nobody else out. Raises httpx.TransportError without a SuperLink.
        """
        wanted = {entry.fingerprint: entry for entry in roster if entry.is_active}
        nodes = {fingerprint_of_pem(node.public_key): node for node in self.nodes()}
        done: list[str] = []
        failed: list[str] = []
        for fingerprint, node in nodes.items():
            if fingerprint not in wanted and node.status != _UNREGISTERED:
                name = node.name or fingerprint
                with _told(failed, f"{name} could not be taken out"):
                    self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
                    done.append(f"{name} may no longer connect")
        for fingerprint, entry in wanted.items():
            known = nodes.get(fingerprint)
            if known is None:
                with _told(failed, f"{entry.name} could not be let in"):
                    key = parse_public_key(entry.public_key, source=entry.name)
                    self._client.RegisterNode(RegisterNodeRequest(public_key=key.pem, name=entry.name))
                    done.append(f"{entry.name} may connect ({fingerprint})")
            elif known.status == _UNREGISTERED:
                failed.append(
                    f"{entry.name} cannot connect: Flower takes a key that was revoked never again; "
                    "have the hospital make a new one (flower-client renew-key)"
                )
        return Enforced(done=done, failed=failed)

    def nodes(self) -> list[NodeInfo]:
        """Every node that was ever registered."""
        return list(self._client.ListNodes(ListNodesRequest()).nodes_info)

    def online(self) -> dict[str, bool]:
        """Whether each registered node is connected, by fingerprint of its key."""
        return online_of(self.nodes())

    def start_run(self) -> int:
        """Submit the bundle of this release; Flower's id of the run."""
        content = bundle_bytes()
        fab = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
        answer = self._client.StartRun(StartRunRequest(fab=fab))
        if not answer.run_id:
            raise FederationError("the SuperLink did not take the run", fix="look at logs/superlink.log")
        return int(answer.run_id)

    def stop_stale_runs(self) -> int:
        """End every run of an earlier session; how many there were. Raises httpx.HTTPError."""
        runs = self._client.ListRuns(ListRunsRequest(limit=1000)).run_dict
        stale = [run_id for run_id, run in runs.items() if run.status.status != _FINISHED]
        for run_id in stale:
            try:
                self._client.StopRun(StopRunRequest(run_id=run_id))
            except httpx.HTTPStatusError as error:  # it ended by itself meanwhile
                log.info("run %d could not be stopped: %d", run_id, error.response.status_code)
        return len(stale)


def online_of(nodes: Iterable[NodeInfo]) -> dict[str, bool]:
    """Whether each registered node is connected, by fingerprint of its key."""
    known = (node for node in nodes if node.status != _UNREGISTERED)
    return {fingerprint_of_pem(node.public_key): node.status == _ONLINE for node in known}


@contextlib.contextmanager
def _told(lines: list[str], failed: str) -> Iterator[None]:
    """Put a failure into words and go on; it is tried again when the roster is enforced next."""
    try:
        yield
    except (httpx.HTTPStatusError, ConfigError) as error:
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else error.what
        lines.append(f"{failed}: Flower answers {status}; see logs/superlink.log")
