"""The only open door of the server: ten Fleet calls over TLS, passed on to the SuperLink on loopback.

A SuperNode retries after 502, 503 and 504 only and dies silently of other errors, so whatever is wrong behind
the door becomes 503. An empty pull is held open until there is a message, so that nobody waits for a poll.
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import ssl
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.bundle.bundle import bundle_sha256
from common.messages import SCHEMA_VERSION
from server.deployment.bell import Bell
from server.deployment.books import Books
from server.deployment.caller import Caller, Callers, Standing
from server.deployment.intake import Intake
from server.deployment.listening import Listening
from server.deployment.news import BELL, NEWS, News
from server.deployment.parked import Parked, ParkedResponse
from server.deployment.passage import Passage
from server.deployment.refused import Refused
from server.deployment.shelf import Shelf, piece_asked_for

FLEET = "/v1/fleet/"
PULL, PULL_OBJECT = FLEET + "pull-messages", FLEET + "pull-object"
OPEN_PATHS = frozenset(
    FLEET + call
    for call in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages"),
        *("get-run", "get-fab", "push-object", "pull-object", "confirm-message-received"),
    )
)
STRANGERS_PATHS = frozenset({FLEET + "activate-node", FLEET + "deactivate-node"})
"""For a key that is not on the roster: Flower's own refusal tells its hospital why."""
CLOSED_PATHS = frozenset({FLEET + "register-node", FLEET + "unregister-node"})
HEADER = "x-hospital-federation"
"""On every answer: release, wire schema and bundle of this server."""

_PASSED_ON = frozenset({200, 400, 401, 403, 412, 415})
_NOT_FORWARDED = frozenset({"host", "connection", "content-length", "transfer-encoding", "keep-alive", "te"})
_PROTOBUF = "application/protobuf"
_ASK_AGAIN_S = 2.0
_BODY_S = 120.0
"""For sending one request's body; a link that needs longer for 5 MB cannot take part."""
_STRANGERS_BODY, _STRANGERS_BODY_S = 64 * 2**10, 10.0
_MOST_EACH = 32
"""Open requests of one hospital, and of all strangers together; a SuperNode has about five."""
_HELD_LATELY_S = 60.0
_LONGEST_HOLDS = 10
"""A signature is valid for 305 s; after this many holds in a row the SuperNode signs anew."""

log = logging.getLogger("front")


@dataclass(frozen=True, kw_only=True)
class FrontSettings:
    """What one front needs to know."""

    upstream: str
    """host:port of the SuperLink."""
    authority: Path
    """CA certificate that the SuperLink's certificate is checked against."""
    state: Path
    """Folder of the bell and of the news of replies."""
    roster: Path
    """roster.json."""
    max_body_bytes: int = 16 * 2**20
    max_reply_bytes: int = 512 * 2**20
    max_requests: int = 400
    hold_s: float = 20.0


class Front:
    """The ASGI application."""

    def __init__(self, settings: FrontSettings) -> None:
        self._settings = settings
        self._bell = Listening(Bell(settings.state / BELL))
        self._books = Books(News(settings.state / NEWS), most_reply_bytes=settings.max_reply_bytes)
        self._callers = Callers(settings.roster)
        self._intake, self._passage, self._shelf = Intake(settings.state), Passage(), Shelf()
        self._open = 0
        self._open_of: Counter[str] = Counter()
        self._held_at: dict[str, float] = {}
        release = importlib.metadata.version("hospital-federation")
        self._about = {HEADER: f"{release};schema={SCHEMA_VERSION};bundle={bundle_sha256()}"}
        limit = settings.max_requests + 10
        self._upstream = httpx.AsyncClient(
            base_url=f"https://{settings.upstream}",
            verify=ssl.create_default_context(cafile=str(settings.authority)),
            timeout=httpx.Timeout(25.0),
            limits=httpx.Limits(max_connections=limit, max_keepalive_connections=limit),
            trust_env=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if self._open >= self._settings.max_requests:
            await self._busy()(scope, receive, send)
            return
        self._open += 1
        try:
            with contextlib.suppress(ClientDisconnect):
                response = await self._answered(Request(scope, receive))
                await response(scope, receive, send)
        finally:
            self._open -= 1

    async def _live(self, receive: Receive, send: Send) -> None:
        """Say that we are ready; at the end let go of the SuperLink."""
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._upstream.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answered(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except Exception as error:  # a fault of ours must not end a hospital's SuperNode, as a 500 would
            if isinstance(error, ClientDisconnect):
                raise
            log.exception("%s could not be answered", request.scope["path"])
            return self._busy()

    async def _answer(self, request: Request) -> Response:
        path = request.scope["path"]
        if path in CLOSED_PATHS:
            return self._say(403, "hospitals are enrolled by the operator")
        if path not in OPEN_PATHS or request.method != "POST":
            return self._say(404, "there is nothing here")
        headers = {k: v for k, v in request.headers.items() if k not in _NOT_FORWARDED}
        caller = self._callers.of(headers)
        if caller.standing is Standing.AGED and path == PULL and self._held_lately(caller.key):
            return self._protobuf(b"")  # its signature has aged in our holds: let it sign anew
        is_enrolled = caller.standing is Standing.ENROLLED
        if not is_enrolled and not (caller.standing is Standing.STRANGER and path in STRANGERS_PATHS):
            return self._say(401, "Invalid SuperNode authentication")
        counted_as = caller.key if is_enrolled else ""
        if self._open_of[counted_as] >= _MOST_EACH:
            return self._busy()
        self._open_of[counted_as] += 1
        try:
            return await self._pass(request, caller, headers)
        except Refused as refusal:
            return self._busy() if refusal.status == 503 else self._say(refusal.status, refusal.text)
        finally:
            self._open_of[counted_as] -= 1

    async def _pass(self, request: Request, caller: Caller, headers: Mapping[str, str]) -> Response:
        """Take the body in and pass the call on. Raises Refused."""
        path, is_stranger = request.scope["path"], caller.standing is Standing.STRANGER
        limit = _STRANGERS_BODY if is_stranger else self._settings.max_body_bytes
        within_s = _STRANGERS_BODY_S if is_stranger else _BODY_S
        async with self._intake.body(request, limit=limit, within_s=within_s) as parked:
            if path == PULL:
                return await self._pull(request, caller.key, headers, parked.content())
            if path == PULL_OBJECT and parked.is_small:
                return await self._piece(headers, parked.content())
            async with contextlib.AsyncExitStack() as stack:
                if not parked.is_small:
                    await stack.enter_async_context(self._passage.slot())
                body = parked.content()
                if is_stranger:
                    return await self._forward(path, headers, body)
                return await self._books.through(
                    path.removeprefix(FLEET), caller.key, body, lambda: self._forward(path, headers, body)
                )

    async def _piece(self, headers: Mapping[str, str], body: bytes) -> Response:
        """A piece of a model: from the shelf, or through the passage. Raises Refused."""
        name = piece_asked_for(body)
        if (piece := self._shelf.take(name)) is None:
            async with self._passage.slot():
                if (piece := self._shelf.take(name)) is None:  # nobody has fetched it meanwhile
                    response = await self._forward(PULL_OBJECT, headers, body)
                    if isinstance(response, ParkedResponse) and response.status_code == 200:
                        self._shelf.keep(name, response.parked)
                    return response
        return ParkedResponse(piece, 200, {**self._about, "content-type": _PROTOBUF})

    async def _forward(self, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        """Ask the SuperLink; whatever a SuperNode would die of becomes 503. A large answer is parked."""
        parked = Parked(self._settings.state)
        try:
            async with self._upstream.stream("POST", path, headers=headers, content=body) as answer:
                async for stretch in answer.aiter_bytes():
                    parked.add(stretch)
        except httpx.HTTPError as error:
            parked.close()
            log.warning("the SuperLink does not answer (%s)", type(error).__name__)
            return self._busy()
        if answer.status_code not in _PASSED_ON:
            parked.close()
            log.warning("the SuperLink answered %s with %d", path, answer.status_code)
            return self._busy()
        about = {**self._about, "content-type": answer.headers.get("content-type", _PROTOBUF)}
        if path == PULL_OBJECT and not parked.is_small:
            return ParkedResponse(parked, answer.status_code, about)
        with parked:
            return Response(parked.content(), answer.status_code, about)

    async def _pull(self, request: Request, key: str, headers: Mapping[str, str], body: bytes) -> Response:
        """Hold the caller until there is a message for it, the hold is over, or it has gone."""
        ends = time.monotonic() + self._settings.hold_s
        gone = asyncio.ensure_future(_gone(request))
        held = _holds_before(request) if self._held_lately(key) else 0
        is_first = not held
        try:
            while not gone.done():
                tone = self._bell.tone
                response = await self._forward(PULL, headers, body)
                if response.status_code == 401 and not is_first:
                    return self._protobuf(b"")  # perhaps its signature has aged meanwhile: let it sign anew
                if response.status_code != 200:
                    return response
                self._held_at[key] = time.monotonic()
                if content := self._books.deliveries.next_for(key, bytes(response.body)):
                    return self._protobuf(content)
                left_s = ends - time.monotonic()
                if left_s <= 0:
                    return self._once_more(held)
                await self._bell.wait(tone, min(left_s, _ASK_AGAIN_S), gone)
                is_first = False
        finally:
            gone.cancel()
        raise ClientDisconnect

    def _held_lately(self, key: str) -> bool:
        """Whether Flower has taken a pull of this key through this process within the last minute."""
        return time.monotonic() - self._held_at.get(key, -_HELD_LATELY_S) < _HELD_LATELY_S

    def _once_more(self, held: int) -> Response:
        """Send the caller here again at once; a plain empty answer would make it sleep for 3 s."""
        if held + 1 >= _LONGEST_HOLDS or self._settings.hold_s < 1:
            return self._protobuf(b"")
        return Response(b"", 307, {**self._about, "location": f"{PULL}?held={held + 1}"})

    def _busy(self) -> Response:
        return self._say(503, "not now; ask again", {"retry-after": "2"})

    def _say(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
        return Response(text + "\n", status, {**self._about, **(headers or {})}, media_type="text/plain")

    def _protobuf(self, content: bytes) -> Response:
        return Response(content, 200, {**self._about, "content-type": _PROTOBUF})


async def _gone(request: Request) -> None:
    """Return when the caller has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _holds_before(request: Request) -> int:
    text = request.query_params.get("held", "0")
    return min(int(text), _LONGEST_HOLDS) if text.isdecimal() and len(text) < 4 else 0
