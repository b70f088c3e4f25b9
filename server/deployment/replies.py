"""Replies as hospitals send them, fetched one by one: what one of them sends can harm nobody else's.

Nothing waits here. Flower gives a reply's head only once, when it is asked for: a reply whose objects are not
all there yet is kept and fetched later.
"""

import logging
from dataclasses import dataclass

import httpx
from flwr.app import Error, Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Metadata as Head
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient

from common.serialisation import set_message_id
from server.deployment.inflation import inflated

REPLY_UNUSABLE, NODE_UNAVAILABLE = 4, 5
"""Flower's numbers for an error reply: the reply cannot be had, the node has gone."""
_ABOUT_THE_MESSAGE = (400, 404, 413, 422)
"""HTTP status of a SuperLink that is well and cannot do this."""
_BOUND = ("run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "message_type")
"""What the SuperLink has checked in the head; the content, which it has not, must say the same."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A reply that Flower has handed over, without its content."""

    head: Head
    tree: ObjectTree


class Incoming:
    """Fetches replies of one run."""

    def __init__(self, client: RuntimeHttpClient, node: Node, run_id: int) -> None:
        self._client, self._node, self._run_id = client, node, run_id

    def claim(self, message_ids: list[str]) -> dict[str, Claimed]:
        """Heads of the replies that are there, by the message they answer. Raises httpx.HTTPError."""
        answer = self._client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        pairs = zip(answer.messages_list, answer.message_object_trees, strict=True)
        return {m.metadata.reply_to_message_id: Claimed(head=m.metadata, tree=tree) for m, tree in pairs}

    def fetch(self, claimed: Claimed, stub: Message, *, from_node: int) -> Message | None:
        """The reply; an error reply in its place when it is unusable; None while objects are missing.

        Raises httpx.HTTPError and RunNotRunningException when the SuperLink, not the reply, is the reason.
        """
        reply: Message | None
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._node, self._run_id)
        is_complete = True

        def pull_once(object_id: str) -> bytes:
            nonlocal is_complete
            try:
                return pull(object_id)
            except ObjectUnavailableError:
                is_complete = False
                raise

        try:
            reply = _as_message(inflated(claimed.tree, pull_once))
            _check(reply, claimed.head, from_node)
        except Exception as error:
            if not is_complete:
                return None
            if _is_about_the_connection(error):
                raise
            # Its words are a stranger's: only the kind of the error is told.
            log.warning("a reply of node %d is unusable: %s", from_node, type(error).__name__)
            reply = None
        self.drop(claimed)
        return reply or unusable(stub)

    def drop(self, claimed: Claimed) -> None:
        """Have the SuperLink forget its objects."""
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=self._run_id, message_object_id=claimed.head.message_id
        )
        try:
            self._client.ConfirmMessageReceived(request)
        except httpx.HTTPStatusError as error:
            if _is_about_the_connection(error):
                raise


def unusable(stub: Message) -> Message:
    """An error reply to a message whose true reply cannot be had."""
    return Message(Error(code=REPLY_UNUSABLE), reply_to=stub)


def _as_message(content: object) -> Message:
    if not isinstance(content, Message):
        raise TypeError(type(content).__name__)
    return content


def _check(reply: Message, head: Head, from_node: int) -> None:
    """Raise ValueError when the content claims to be another reply, or another node's, than its head."""
    inner = reply.metadata
    differs = [key for key in _BOUND if getattr(inner, key) != getattr(head, key)]
    if head.src_node_id != from_node and not reply.has_error():  # the SuperLink's own are errors
        differs.append("sender")
    if differs:
        raise ValueError(f"{differs} differ from what the SuperLink has checked")
    set_message_id(reply, head.message_id)


def _is_about_the_connection(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code not in _ABOUT_THE_MESSAGE
    return isinstance(error, httpx.HTTPError | RunNotRunningException)
