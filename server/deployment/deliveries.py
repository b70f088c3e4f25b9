"""What the front has handed to each hospital, so that no message is lost on the way.

Flower marks a message as delivered when it is asked for. A caller that is cut off just then would never see
it: the front keeps what it handed out until the hospital has confirmed it, and hands it out again otherwise.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.proto.fleet_pb2 import PullMessagesResponse

_MOST_TIMES = 3
_MOST_SESSIONS = 1000


@dataclass(kw_only=True)
class _Handed:
    message_id: str
    content: bytes
    expires: float
    """Unix seconds."""
    times: int = 0


@dataclass(kw_only=True)
class _Caller:
    on_the_way: list[_Handed] = field(default_factory=list)
    working_on: set[str] = field(default_factory=set)
    """Confirmed messages without a reply: they live in the memory of the hospital's SuperNode only."""


@dataclass(kw_only=True)
class _Sending:
    message_ids: list[str]
    missing: set[str]
    """Objects of the replies that are still to come."""


class Deliveries:
    """By the caller's key; only what Flower has answered with success may be noted here."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._callers: dict[str, _Caller] = {}
        self._sessions: OrderedDict[str, _Sending] = OrderedDict()
        self._clock = clock

    def next_for(self, key: str, content: bytes) -> bytes:
        """Take in Flower's answer to a pull; gives what the caller gets, unconfirmed answers first."""
        caller = self._callers.setdefault(key, _Caller())
        if content:
            caller.on_the_way += _handed(content)
        now = self._clock()
        caller.on_the_way = [m for m in caller.on_the_way if m.expires > now and m.times < _MOST_TIMES]
        if not caller.on_the_way:
            return b""
        first = caller.on_the_way[0]
        first.times += 1
        return first.content

    def confirmed(self, key: str, message_id: str) -> None:
        """The hospital has the whole message."""
        if (caller := self._callers.get(key)) is not None:
            caller.on_the_way = [m for m in caller.on_the_way if m.message_id != message_id]
            caller.working_on.add(message_id)

    def ignored(self, key: str) -> None:
        """The hospital was told that the run is over: it drops the message that it was about to take."""
        if (caller := self._callers.get(key)) is not None:
            caller.on_the_way.clear()

    def replied(self, key: str, message_ids: list[str], *, session: str, missing: list[str]) -> None:
        """The hospital begins to send replies to these messages; the objects `missing` are to come."""
        if (caller := self._callers.get(key)) is not None:
            caller.working_on -= set(message_ids)
        if missing:
            self._sessions[session] = _Sending(message_ids=message_ids, missing=set(missing))
        while len(self._sessions) > _MOST_SESSIONS:
            self._sessions.popitem(last=False)

    def object_stored(self, session: str, object_id: str) -> list[str]:
        """A part of a reply has come; the messages whose reply is whole by it."""
        if (sending := self._sessions.get(session)) is None:
            return []
        sending.missing.discard(object_id)
        if sending.missing:
            return []
        del self._sessions[session]
        return sending.message_ids

    def activated(self, key: str) -> list[str]:
        """A new SuperNode of this hospital is there; the messages that the one before has taken with it."""
        caller = self._callers.get(key)
        if caller is None:
            return []
        lost, caller.working_on = sorted(caller.working_on), set()
        return lost


def _handed(content: bytes) -> list[_Handed]:
    response = PullMessagesResponse.FromString(content)
    return [
        _Handed(
            message_id=m.metadata.message_id, content=content, expires=m.metadata.created_at + m.metadata.ttl
        )
        for m in response.messages_list
    ][:1]
