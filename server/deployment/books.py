"""Keeps the deliveries by what passes the front: which call means what for a message or a reply."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PushObjectRequest, PushObjectResponse
from google.protobuf.message import DecodeError
from starlette.responses import Response

from server.deployment.deliveries import Deliveries
from server.deployment.news import Kind, News
from server.deployment.refused import Refused

Forward = Callable[[], Coroutine[None, None, Response]]
_SESSION_S = 150.0
"""Flower gives a session of parts up after 180 s; as long a repeated beginning gets the same answer."""

log = logging.getLogger("front")


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A reply whose parts are on their way."""

    at: float
    """`time.monotonic` seconds."""
    answer: "asyncio.Future[Response]"


class Books:
    """For enrolled callers, by the fingerprint of their key."""

    def __init__(self, news: News, *, most_reply_bytes: int) -> None:
        self._news = news
        self._begun: dict[tuple[str, bytes], _Begun] = {}
        self.deliveries = Deliveries(self._tell, most_reply_bytes=most_reply_bytes)

    async def through(self, call: str, key: str, body: bytes, forward: Forward) -> Response:
        """Pass a call on and note what became of it. Raises Refused."""
        try:
            if call == "push-object":
                return await self._part(key, body, forward)
            if call == "push-messages":
                return await self._reply(key, body, forward)
            if call == "confirm-message-received":
                return await self._confirmation(key, body, forward)
        except DecodeError:
            raise Refused(400, "this is not what it should be") from None
        response = await forward()
        if response.status_code == 403:
            self.deliveries.ignored(key)
        elif response.status_code == 200 and call == "activate-node":
            self.deliveries.activated(key)
        return response

    async def _part(self, key: str, body: bytes, forward: Forward) -> Response:
        part = PushObjectRequest.FromString(body)
        session, object_id, size = part.session_id, part.object_id, len(part.object_content)
        del part
        if not self.deliveries.part_begins(key, session, size):
            raise Refused(413, "this reply is too large, or given up")
        stored = None
        try:
            response = await forward()
            if response.status_code == 200:
                stored = PushObjectResponse.FromString(bytes(response.body)).stored
        finally:
            self.deliveries.part_ended(key, session, object_id, size=size, stored=stored)
        return response

    async def _reply(self, key: str, body: bytes, forward: Forward) -> Response:
        request = PushMessagesRequest.FromString(body)
        if any(m.metadata.src_node_id != request.node.node_id for m in request.messages_list):
            raise Refused(403, "a hospital replies for itself only")
        return await self._once(key, body, lambda: self._begin(key, request, forward))

    async def _once(self, key: str, body: bytes, begin: Forward) -> Response:
        """Begin each reply once: after a cut the first request may arrive beside its repetition.

        Flower would open a second session, and the hospital would send the parts in the one that is closed.
        """
        now, token = time.monotonic(), (key, hashlib.sha256(body).digest())
        self._begun = {t: b for t, b in self._begun.items() if now - b.at < _SESSION_S}
        begun = self._begun.get(token)
        if begun is None:
            begun = self._begun[token] = _Begun(at=now, answer=asyncio.ensure_future(begin()))
        try:
            response = await asyncio.shield(begun.answer)
        except BaseException:
            self._begun.pop(token, None)
            raise
        if response.status_code != 200:
            self._begun.pop(token, None)
        return response

    async def _begin(self, key: str, request: PushMessagesRequest, forward: Forward) -> Response:
        response = await forward()
        if response.status_code == 403:
            self.deliveries.ignored(key)
        if response.status_code == 200 and request.messages_list:
            answer = PushMessagesResponse.FromString(bytes(response.body))
            message_id = request.messages_list[0].metadata.reply_to_message_id  # Flower looks at no other
            missing = list(answer.objects_to_push)
            self.deliveries.replied(key, message_id, session=answer.session_id, missing=missing)
        return response

    async def _confirmation(self, key: str, body: bytes, forward: Forward) -> Response:
        message_id = ConfirmMessageReceivedRequest.FromString(body).message_object_id
        response = await forward()
        if response.status_code == 403:
            self.deliveries.ignored(key)
        if response.status_code == 200:
            self.deliveries.confirmed(key, message_id)
        return response

    def _tell(self, kind: Kind, message_id: str) -> None:
        try:
            self._news.tell(kind, message_id)
        except OSError as error:  # the server process looks by itself every few seconds
            log.error("the news of a reply cannot be written: %s", error)
