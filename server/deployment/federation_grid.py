"""Flower's Grid for a real federation: only hospitals of the roster, replies as soon as they are whole.

Looking for replies costs the SuperLink a database transaction; the front tells when there is one, so that
this side looks then, and otherwise seldom.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from common.errors import ConfigError
from common.files import append_line
from common.node_keys import fingerprint_of_pem
from common.serialisation import set_message_id
from server.deployment.bell import Bell
from server.deployment.news import BELL, NEWS, Kind, News
from server.deployment.outgoing import push
from server.deployment.replies import NODE_UNAVAILABLE, Claimed, Incoming, unusable
from server.provisioning.roster import RosterEntry, read_roster

NODES_KNOWN_FOR_S = 0.5
LOOK_AGAIN_S = 5.0
"""Without news replies are looked for this often: expired messages and lost nodes make none."""
SENDING_S = 180.0
"""Flower gives a hospital this long to send one reply, counted anew with every part that comes."""
AWAY_S = 30.0
"""A hospital that comes back this soon after Flower thinks it gone keeps its place in the round."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Pending:
    node_id: int
    stub: Message
    """The message without its content."""
    forget_at: float
    """Long after its reply would have come too late."""
    looked_at: float
    begun: float | None = None
    """When its reply began to arrive and was not whole yet."""
    is_whole: bool = False
    is_lost: bool = False
    claimed: Claimed | None = None
    """Its reply, whose objects were not all there when Flower was asked."""
    claimed_at: float = 0.0


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
        self._forget_old()
        outgoing = list(messages)
        message_ids = list(super().push_messages(outgoing))
        self._bell.ring()
        now = self._clock()
        for message in outgoing:
            if (message_id := message.metadata.message_id) in message_ids:
                self._pending[message_id] = _Pending(
                    node_id=message.metadata.dst_node_id,
                    stub=_without_content(message),
                    looked_at=now,
                    forget_at=now + 2 * message.metadata.ttl + SENDING_S,
                )
        return message_ids

    def _try_push_messages(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        """Flower's place for what is sent; see `outgoing`."""
        return push(self._runtime_client, self.node, run_id, list(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are whole; an error reply for what is unusable and for hospitals that are gone."""
        self._hear()
        due = {m: self._pending[m] for m in message_ids if m in self._pending and self._is_due(m)}
        if not due:
            return []
        self._look_at_nodes(fresh=True)
        now, asked = self._clock(), []
        for message_id, pending in due.items():
            pending.is_whole, pending.looked_at = False, now
            if not (pending.is_lost or pending.claimed or self._is_away(pending)):
                asked.append(message_id)
        if asked:
            for message_id, claimed in self._incoming.claim(asked).items():
                if message_id in due:
                    due[message_id].claimed, due[message_id].claimed_at = claimed, now
        replies = []
        for message_id, pending in due.items():
            if (reply := self._reply_to(pending)) is not None:
                del self._pending[message_id]
                replies.append(reply)
        return replies

    def _reply_to(self, pending: _Pending) -> Message | None:
        """What there is to say in answer to one message now."""
        if (claimed := pending.claimed) is not None:
            reply = self._incoming.fetch(claimed, pending.stub, from_node=pending.node_id)
            if reply is not None:
                return reply
            if self._clock() - max(pending.claimed_at, pending.begun or 0.0) >= SENDING_S:
                self._incoming.drop(claimed)
                return unusable(pending.stub)
        return Message(Error(code=NODE_UNAVAILABLE), reply_to=pending.stub) if pending.is_lost else None

    @cached_property
    def _incoming(self) -> Incoming:
        return Incoming(self._runtime_client, self.node, cast(Run, self._run).run_id)

    def _forget_old(self) -> None:
        """Messages that nobody asks for any more, and what has come of their replies."""
        now = self._clock()
        for message_id, pending in list(self._pending.items()):
            if pending.forget_at < now:
                del self._pending[message_id]
                if pending.claimed is not None:
                    self._incoming.drop(pending.claimed)

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
        pending = self._pending[message_id]
        if pending.is_whole or pending.is_lost:
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
    set_message_id(stub, old.message_id)
    return stub
