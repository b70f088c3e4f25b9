"""Sending to hospitals over Flower's Grid and taking their replies as they come."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.messages import content_bytes

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.1
_BYTES_AT_ONCE = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One message on its way."""

    message_id: str
    sent: float
    """Unix seconds."""
    num_bytes: int


def send(
    grid: Grid, contents: Mapping[int, RecordDict], *, message_type: str, group: str, ttl_s: float
) -> dict[int, Sent]:
    """Send each node its content; gives, by node, what the grid accepted."""
    messages = [
        Message(content, node_id, message_type, ttl=ttl_s, group_id=group)
        for node_id, content in contents.items()
    ]
    sent = time.time()
    # A grid may leave out what it refused or put None in its place, so order says nothing; the id does.
    accepted = set(grid.push_messages(messages)) if messages else set()
    return {
        message.metadata.dst_node_id: Sent(
            message_id=message.metadata.message_id, sent=sent, num_bytes=content_bytes(message.content)
        )
        for message in messages
        if message.metadata.message_id in accepted
    }


def receive(
    grid: Grid,
    message_ids: Iterable[str],
    *,
    timeout_s: float,
    reply_bytes: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Message]:
    """Yield the first reply to each message as it comes, until all came, time is over or `stop()`.

    Replies of about `reply_bytes` are fetched a few at a time, so that memory does not grow with hospitals;
    whoever takes one lets go of it (`del`) before asking for the next.
    A second reply to one message and replies to others are dropped.
    """
    pending = list(dict.fromkeys(message_ids))
    unanswered = set(pending)
    give_up_at = time.monotonic() + timeout_s
    pause = SHORTEST_PAUSE_S
    at_once = max(1, _BYTES_AT_ONCE // max(1, reply_bytes))
    while pending and not stop():
        before = len(unanswered)
        for start in range(0, len(pending), at_once):
            replies = list(grid.pull_messages(pending[start : start + at_once]))
            while replies:
                request_id = replies[0].metadata.reply_to_message_id
                if request_id in unanswered:
                    unanswered.discard(request_id)
                    yield replies.pop(0)  # nothing here refers to it while the next ones are fetched
                else:
                    replies.pop(0)
        arrived = len(unanswered) < before
        pending = [message_id for message_id in pending if message_id in unanswered]
        time_left = give_up_at - time.monotonic()
        if not pending or time_left <= 0:
            return
        pause = SHORTEST_PAUSE_S if arrived else min(LONGEST_PAUSE_S, 2 * pause)
        time.sleep(min(pause, time_left))
