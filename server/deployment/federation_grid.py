"""Flower's Grid for a real federation: only hospitals of the roster, replies as soon as they are whole.

Looking for replies costs the SuperLink a database transaction; the front tells when there is one, so that
this side looks then, and otherwise seldom.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.superlink.grid import HttpGrid

from common.errors import ConfigError
from common.files import append_line
from common.node_keys import fingerprint_of_pem
from server.deployment.bell import Bell
from server.deployment.news import BELL, NEWS, Kind, News
from server.provisioning.roster import RosterEntry, read_roster

NODE_UNAVAILABLE = 5
"""Flower's number for an error reply: the node has gone."""
NODES_KNOWN_FOR_S = 0.5
LOOK_AGAIN_S = 5.0
"""Without news replies are looked for this often: expired messages and lost nodes make none."""
SENDING_S = 180.0
"""Flower gives a hospital this long to send one reply."""
AWAY_S = 30.0
"""A hospital that comes back this soon after Flower thinks it gone keeps its place in the round."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Pending:
    node_id: int
    stub: Message
    """The message without its content."""
    looked_at: float
    begun: float | None = None
    """When its reply began to arrive and was not whole yet."""
    is_whole: bool = False
    is_lost: bool = False


class FederationGrid(HttpGrid):
    """Hides every node that the roster does not name."""

    def __init__(
        self,
        address: str,
        *,
        authority: bytes,
        token: str,
        roster: Path,
        state: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(address, root_certificates=authority, token=token)
        self.audit: Path | None = None
        """audit.jsonl of the run; None keeps strangers in the log only."""
        self._roster_path, self._clock = roster, clock
        self._bell, self._news = Bell(state / BELL), News(state / NEWS)
        self._roster: dict[str, RosterEntry] = {}
        self._roster_tone = -1
        self._nodes: dict[int, RosterEntry] = {}
        self._nodes_until = 0.0
        self._strangers: set[int] = set()
        self._away_since: dict[int, float] = {}
        self._pending: dict[str, _Pending] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Nodes of enrolled hospitals that are connected, as of at most half a second ago."""
        self._look_at_nodes()
        return sorted(self._nodes)

    def enrolled_as(self, node_id: int) -> RosterEntry | None:
        """The hospital on the roster whose key this connected node has proved."""
        self._look_at_nodes()
        return self._nodes.get(node_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the SuperLink and ring for the front, which has hospitals waiting."""
        outgoing = list(messages)
        message_ids = list(super().push_messages(outgoing))
        self._bell.ring()
        for message in outgoing:
            if (message_id := message.metadata.message_id) in message_ids:
                node_id, stub = message.metadata.dst_node_id, _without_content(message)
                self._pending[message_id] = _Pending(node_id=node_id, stub=stub, looked_at=self._clock())
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are whole; an error reply for hospitals that are gone for good."""
        self._hear()
        due = [message_id for message_id in message_ids if self._is_due(message_id)]
        if not due:
            return []
        self._look_at_nodes(fresh=True)
        pending = {m: self._pending[m] for m in due if m in self._pending}
        replies = [
            Message(Error(code=NODE_UNAVAILABLE), reply_to=p.stub) for p in pending.values() if p.is_lost
        ]
        asked = [m for m in due if m not in pending or not (pending[m].is_lost or self._is_away(pending[m]))]
        for entry in pending.values():
            entry.is_whole, entry.looked_at = False, self._clock()
        replies += super().pull_messages(asked) if asked else []
        for reply in replies:
            self._pending.pop(reply.metadata.reply_to_message_id, None)
        return replies

    def _hear(self) -> None:
        """Take in what the front has seen of the replies."""
        for kind, message_id in self._news.fresh():
            if (pending := self._pending.get(message_id)) is None:
                continue
            if kind is Kind.BEGUN:
                pending.begun = self._clock()
            elif kind is Kind.WHOLE:
                pending.is_whole, pending.begun = True, None
            else:
                pending.is_lost = True

    def _is_due(self, message_id: str) -> bool:
        pending = self._pending.get(message_id)
        if pending is None or pending.is_whole or pending.is_lost:
            return True
        now = self._clock()
        if pending.begun is not None and now - pending.begun < SENDING_S:
            return False
        return now - pending.looked_at >= LOOK_AGAIN_S

    def _is_away(self, pending: _Pending) -> bool:
        """Whether its hospital has just gone offline: Flower would answer for it, and drop its late reply."""
        since = self._away_since.get(pending.node_id)
        return since is not None and self._clock() - since < AWAY_S

    def _look_at_nodes(self, *, fresh: bool = False) -> None:
        now = self._clock()
        if now < self._nodes_until and not fresh:
            return
        self._read_roster()
        here: dict[int, RosterEntry] = {}
        for node in self.get_nodes():
            if (entry := self._roster.get(fingerprint_of_pem(node.public_key))) is not None:
                here[node.node_id] = entry
            else:
                self._tell_of_stranger(node)
        self._nodes, self._nodes_until = here, self._clock() + NODES_KNOWN_FOR_S
        expected = {pending.node_id for pending in self._pending.values()}
        self._away_since = {node: self._away_since.get(node, now) for node in expected - set(here)}

    def _read_roster(self) -> None:
        if (tone := Bell(self._roster_path).tone) == self._roster_tone:
            return
        first, self._roster_tone = self._roster_tone == -1, tone
        try:
            self._roster = {e.fingerprint: e for e in read_roster(self._roster_path) if e.is_active}
        except ConfigError as error:
            if first:
                raise
            log.error("the roster is left as it was: %s", error.what)

    def _tell_of_stranger(self, node: NodeInfo) -> None:
        if node.node_id in self._strangers:
            return
        self._strangers.add(node.node_id)
        fingerprint = fingerprint_of_pem(node.public_key) or "no key that can be read"
        log.warning("a node that is not on the roster is connected and never asked: %s", fingerprint)
        if self.audit is not None:
            line = {"time": time.time(), "event": "stranger", "node": str(node.node_id), "key": fingerprint}
            append_line(self.audit, json.dumps(line), durable=True)


def _without_content(message: Message) -> Message:
    """What a reply needs to know of its request; the content would keep a model in memory per hospital."""
    old = message.metadata
    stub = Message(RecordDict(), old.dst_node_id, old.message_type, ttl=old.ttl, group_id=old.group_id)
    stub.metadata.__dict__["_message_id"] = old.message_id
    return stub
