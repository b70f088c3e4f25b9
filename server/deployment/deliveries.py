"""What the front has handed to each hospital and gets back, so that no message is lost on the way.

Flower marks a message as delivered when it is asked for. A caller that is cut off just then would never see
it: the front keeps what it handed out until the hospital has confirmed it, and hands it out again otherwise.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.proto.fleet_pb2 import PullMessagesResponse

from server.deployment.news import Kind

_MOST_TIMES = 3
_MOST_SESSIONS = 16
"""Of one hospital; it answers one message after the other."""
_TELL_AGAIN_S = 30.0
_KEPT_S = 86_400.0
"""For a message that was handed out before this process began: its end is not known."""
_MESSAGE_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(kw_only=True)
class _Handed:
    message_id: str
    content: bytes
    expires: float
    """Unix seconds."""
    times: int = 0


@dataclass(kw_only=True)
class _Sending:
    """One push session: a reply of which parts are still to come."""

    message_id: str = ""
    missing: set[str] = field(default_factory=set)
    told: float = 0.0
    size: int = 0
    """Bytes that are stored or on the way."""
    is_over: bool = False
    """Its reply cannot become whole."""


@dataclass(kw_only=True)
class _Caller:
    on_the_way: list[_Handed] = field(default_factory=list)
    working_on: dict[str, float] = field(default_factory=dict)
    """Confirmed messages without a whole reply, and their end: they live in the SuperNode's memory only."""
    sessions: dict[str, _Sending] = field(default_factory=dict)
    others: _Sending = field(default_factory=_Sending)
    """Parts for sessions that this process has not seen begin, all counted together."""

    def session(self, name: str) -> _Sending:
        return self.sessions.get(name, self.others)


class Deliveries:
    """By the caller's key; only what Flower has answered with success may be noted here."""

    def __init__(
        self,
        tell: Callable[[Kind, str], None],
        *,
        most_reply_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._callers: dict[str, _Caller] = {}
        self._tell, self._most, self._clock = tell, most_reply_bytes, clock

    def next_for(self, key: str, content: bytes) -> bytes:
        """Take in Flower's answer to a pull; gives what the caller gets, unconfirmed answers first.

        What was handed out three times without being confirmed is told as lost.
        """
        caller, now = self._caller(key), self._clock()
        if content:
            caller.on_the_way += _handed(content)
        alive = [m for m in caller.on_the_way if m.expires > now]
        caller.on_the_way = [m for m in alive if m.times < _MOST_TIMES]
        caller.working_on = {m: end for m, end in caller.working_on.items() if end > now}
        for message in alive:
            if message.times >= _MOST_TIMES:
                self._say(Kind.LOST, message.message_id)
        if not caller.on_the_way:
            return b""
        first = caller.on_the_way[0]
        first.times += 1
        return first.content

    def confirmed(self, key: str, message_id: str) -> None:
        """The hospital has the whole message; nothing happens when it was not handed to it."""
        caller = self._caller(key)
        for message in caller.on_the_way:
            if message.message_id == message_id:
                caller.working_on[message_id] = message.expires
        caller.on_the_way = [m for m in caller.on_the_way if m.message_id != message_id]

    def ignored(self, key: str) -> None:
        """The hospital was told that the run is over: it drops the message that it was about to take."""
        self._caller(key).on_the_way.clear()

    def replied(self, key: str, message_id: str, *, session: str, missing: list[str]) -> None:
        """The hospital begins to send a reply to this message; the objects `missing` are to come.

        Flower names missing objects only after it has looked whether the message was for this very node.
        """
        caller = self._caller(key)
        self.confirmed(key, message_id)
        if message_id not in caller.working_on and not (missing and _MESSAGE_ID.fullmatch(message_id)):
            return
        if not missing:
            del caller.working_on[message_id]
            self._say(Kind.WHOLE, message_id)
            return
        caller.working_on.setdefault(message_id, self._clock() + _KEPT_S)
        sending = _Sending(message_id=message_id, missing=set(missing), told=self._clock())
        caller.sessions[session], caller.others = sending, _Sending()
        while len(caller.sessions) > _MOST_SESSIONS:
            del caller.sessions[next(iter(caller.sessions))]
        self._say(Kind.BEGUN, message_id)

    def part_begins(self, key: str, session: str, size: int) -> bool:
        """Whether a part of `size` bytes may be passed on; a reply that grows too large is told as lost."""
        caller = self._caller(key)
        sending = caller.session(session)
        if sending.size + size > self._most:
            self._give_up(caller, sending)
            return False
        if sending.is_over:
            return False
        sending.size += size
        return True

    def part_ended(self, key: str, session: str, object_id: str, *, size: int, stored: bool | None) -> None:
        """What Flower said to a part; None when it said nothing. A SuperNode gives up after a refusal."""
        caller = self._caller(key)
        sending = caller.session(session)
        if not stored:
            sending.size -= size
        if stored is None or object_id not in sending.missing:
            return
        if not stored:
            self._give_up(caller, sending)
            return
        sending.missing.discard(object_id)
        if not sending.missing:
            del caller.sessions[session]
            caller.working_on.pop(sending.message_id, None)
            self._say(Kind.WHOLE, sending.message_id)
        elif self._clock() - sending.told >= _TELL_AGAIN_S:
            sending.told = self._clock()
            self._say(Kind.BEGUN, sending.message_id)

    def activated(self, key: str) -> None:
        """A new SuperNode of this hospital is there; what the one before had is lost with it."""
        caller = self._caller(key)
        lost, caller.working_on = sorted(caller.working_on), {}
        caller.sessions.clear()
        for message_id in lost:
            self._say(Kind.LOST, message_id)

    def _give_up(self, caller: _Caller, sending: _Sending) -> None:
        if sending is caller.others:
            return
        if not sending.is_over and caller.working_on.pop(sending.message_id, None) is not None:
            self._say(Kind.LOST, sending.message_id)
        sending.is_over = True
        sending.missing.clear()

    def _caller(self, key: str) -> _Caller:
        return self._callers.setdefault(key, _Caller())

    def _say(self, kind: Kind, message_id: str) -> None:
        if _MESSAGE_ID.fullmatch(message_id):
            self._tell(kind, message_id)


def _handed(content: bytes) -> list[_Handed]:
    response = PullMessagesResponse.FromString(content)
    return [
        _Handed(
            message_id=m.metadata.message_id, content=content, expires=m.metadata.created_at + m.metadata.ttl
        )
        for m in response.messages_list
    ][:1]
